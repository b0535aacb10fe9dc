"""Weights in files, under the authors' tensor names."""

import os
import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from spatial_mamba_jax.convert.messages import listed, short
from spatial_mamba_jax.convert.prefixes import is_average, unwrapped
from spatial_mamba_jax.convert.safetensors_file import (
  check_numbers,
  read_safetensors,
)
from spatial_mamba_jax.convert.torch_checkpoint import Selected, read_first
from spatial_mamba_jax.paths import make_directory

SAFETENSORS = "model.safetensors"
# Of a directory, in order of preference. The second is what Hugging Face's
# Trainer wrote before there were safetensors.
_IN_DIRECTORY = (SAFETENSORS, "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Where trainers keep a model's weights, in order of preference.
_AVERAGES = (
  "model_ema",  # The authors', as Swin's and VMamba's.
  "state_dict_ema",  # timm's.
  "ema_state_dict",
  "params_ema",  # BasicSR's.
)
_WEIGHTS = (
  "model",  # The authors', DeiT's, torchvision's.
  "state_dict",  # timm's, mmengine's, Lightning's.
  "model_state_dict",  # PyTorch's tutorials.
  "module",  # DeepSpeed's.
  "params",  # BasicSR's.
)


class Found(NamedTuple):
  """What a file holds.

  Attributes:
    state_dict: {the authors' tensor name: array}.
    key: the dictionary of the file that was taken, where it has several.
    left_out: names of tensors that are not the model's: of a detector around
      the backbone, of a loss, counters.
    prefixes: by which wrappers named all tensors, e.g. "module.".
    others: keys and prefixes of other weights in the file.
    is_average: whether the weights are a moving average.
  """

  state_dict: dict[str, np.ndarray]
  key: str | None = None
  left_out: tuple[str, ...] = ()
  prefixes: tuple[str, ...] = ()
  others: tuple[str, ...] = ()
  is_average: bool = False

  def origin(self) -> str:
    """What of the file was taken, in words that follow others."""
    words = ""
    if self.key is not None:
      words += f", from '{short(self.key)}'"
    if self.others:
      words += f" (--key takes others: {listed(self.others)})"
    if self.prefixes:
      words += f", without the prefixes {listed(self.prefixes, 6)}"
    if self.left_out:
      words += (
        f"; left out {len(self.left_out)} tensors that are not the model's"
        f" ({listed(self.left_out)})"
      )
    return words


def is_of_weights(path: pathlib.Path) -> bool:
  """Whether `read_file` takes the path; it is no checkpoint of a run then."""
  names = (*_IN_DIRECTORY, *_INDICES)
  return not path.is_dir() or any((path / name).exists() for name in names)


def read_file(
  path: pathlib.Path, *, raw: bool = False, key: str | None = None
) -> Found:
  """Reads weights from a file, or from a directory of `save_pretrained`.

  Args:
    path: a `.safetensors` file; a directory with a `model.safetensors` or a
      `pytorch_model.bin`; or PyTorch's checkpoint, of tensors alone or of a
      trainer, which keeps them below one of the keys that this module lists.
      Of a detector, the backbone is taken.
    raw: whether to take the weights even where there is a moving average.
    key: of the dictionary to take, or a prefix of the tensors to take; one
      inside another is "state.model".

  Raises:
    OSError: the file cannot be opened.
    ValueError: it holds no weights, or is damaged.
  """
  path = _file_in(path)
  prefix = ""
  if path.suffix == ".safetensors":
    found = Selected(None, (), read_safetensors(path))
  elif key is None:
    keys = (*_AVERAGES * (not raw), *_WEIGHTS)
    found = read_first(path, keys, or_only=True)
  else:
    found = read_first(path, _outward(key))
  if key is not None:
    prefix = key.removeprefix(found.key or "").removeprefix(".")
  try:
    inner = unwrapped(_below(found.tensors, prefix), raw=raw)
    tensors = inner.tensors.values()
    # Of tensors that overlap, a few bytes become any number when copied.
    if sum(x.nbytes for x in tensors) > path.stat().st_size:
      raise ValueError("it has tensors that overlap")
    check_numbers(sum(x.size for x in tensors))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  stem = "" if found.key is None else f"{found.key}."
  others = (f"{stem}{x}".removesuffix(".") for x in inner.others)
  beside = [
    x for x in found.tensors if prefix and not x.startswith(f"{prefix}.")
  ]
  return Found(
    inner.tensors,
    key or found.key,
    (*inner.left_out, *beside),
    inner.prefixes,
    (*found.others, *others),
    any(map(is_average, (key or found.key or "", *inner.prefixes))),
  )


def _file_in(path: pathlib.Path) -> pathlib.Path:
  """The path if it is a file, else the directory's file of weights."""
  names = _IN_DIRECTORY if path.is_dir() else ()
  file = next((path / x for x in names if (path / x).exists()), path)
  indices = [x for x in _INDICES if (path / x).exists() or path.name == x]
  if file == path and indices:
    raise ValueError(
      f"{path} has its weights in several files ({indices[0]}): save them as"
      " one, with max_shard_size of save_pretrained"
    )
  if file.exists() and not file.is_file():
    raise ValueError(f"{file} is no file")
  return file


def _outward(key: str) -> list[str]:
  """Of "a.b.c" itself, "a.b" and "a": the rest may be a prefix of names."""
  parts = key.split(".")
  return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _below(
  tensors: dict[str, np.ndarray], prefix: str
) -> dict[str, np.ndarray]:
  """The tensors whose names begin with a prefix, named without it."""
  if not prefix:
    return tensors
  dot = f"{prefix}."
  below = {
    name.removeprefix(dot): tensor
    for name, tensor in tensors.items()
    if name.startswith(dot)
  }
  if not below:
    raise ValueError(
      f"none of its {len(tensors)} tensors ({listed(tensors)}) is below the key"
      f" '{short(prefix)}'"
    )
  return below


@contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path to write to, which becomes `path` once all is written.

  A failure leaves nothing behind, no parent directory either.

  Raises:
    FileExistsError: `path` exists, and is no empty directory.
  """
  is_empty = path.is_dir() and not any(path.iterdir())
  if os.path.lexists(path) and not is_empty:
    raise FileExistsError(f"{path} exists, and is left as it is")
  absent = [x for x in path.parents if not x.exists()]
  make_directory(path.parent)
  try:
    with tempfile.TemporaryDirectory(
      dir=path.parent, prefix=f".{path.name[:100]}."
    ) as directory:
      part = pathlib.Path(directory) / path.name
      yield part
      part.rename(path)
  except BaseException as error:
    for parent in absent:
      with suppress(OSError):  # Others may have put something there.
        parent.rmdir()
    if isinstance(error, OSError) and error.errno:
      error.filename = str(path)  # The partial file is gone.
    raise
