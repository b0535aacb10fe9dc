"""Reads files of weights with the authors' tensor names."""

import os
import pathlib
import tempfile
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np

from spatial_mamba_jax.convert.messages import listed, short
from spatial_mamba_jax.convert.prefixes import is_average, unwrapped
from spatial_mamba_jax.convert.safetensors_file import (
  check_element_count,
  read_safetensors,
)
from spatial_mamba_jax.convert.torch_checkpoint import Selected, read_first
from spatial_mamba_jax.convert.trained import Trained
from spatial_mamba_jax.paths import make_directory

SAFETENSORS = "model.safetensors"
# Files of weights in a directory, in order of preference. Hugging Face's
# Trainer wrote the second before it used safetensors.
_IN_DIRECTORY = (SAFETENSORS, "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Keys of weights in the checkpoints of trainers, in order of preference:
# first of moving averages, then of the weights themselves.
_AVERAGES = (
  "model_ema",  # The authors, Swin, VMamba.
  "state_dict_ema",  # timm.
  "ema_state_dict",
  "params_ema",  # BasicSR.
)
_WEIGHTS = (
  "model",  # The authors, DeiT, torchvision.
  "state_dict",  # timm, mmengine, Lightning.
  "model_state_dict",  # PyTorch's tutorials.
  "module",  # DeepSpeed.
  "params",  # BasicSR.
)


class Found(NamedTuple):
  """The weights found in a file or checkpoint.

  Attributes:
    state_dict: {the authors' tensor name: array}.
    key: the key that the weights have in the file; None for no key.
    left_out: the names of tensors that do not belong to the model, such as a
      detector's head, parameters of a loss, or counters.
    prefixes: prefixes removed from the names, e.g. "module.".
    others: keys and prefixes of other weights in the file.
    is_average: whether the weights are a moving average.
    heads: {the authors' tensor name: array} of a segmentor's heads, beside
      `state_dict` of its backbone; empty for other models.
    trained: what the run that trained them stores of the model.
  """

  state_dict: dict[str, np.ndarray]
  key: str | None = None
  left_out: tuple[str, ...] = ()
  prefixes: tuple[str, ...] = ()
  others: tuple[str, ...] = ()
  is_average: bool = False
  heads: Mapping[str, np.ndarray] = types.MappingProxyType({})
  trained: Trained = Trained()

  @property
  def whole(self) -> dict[str, np.ndarray]:
    """The tensors of the whole model, a segmentor's with its heads."""
    if not self.heads:
      return self.state_dict
    backbone = {f"backbone.{k}": x for k, x in self.state_dict.items()}
    return {**backbone, **self.heads}

  def origin(self) -> str:
    """Returns the end of a message that says where the weights come from."""
    text = ""
    if self.key is not None:
      text += f", from '{short(self.key)}'"
    if self.others:
      text += f" (--key selects others: {listed(self.others)})"
    if self.prefixes:
      text += f", without the prefixes {listed(self.prefixes, 6)}"
    if self.left_out:
      text += (
        f"; left out {len(self.left_out)} tensors that are not the model's"
        f" ({listed(self.left_out)})"
      )
    return text


def is_of_weights(path: pathlib.Path) -> bool:
  """Whether `read_file` reads the path; otherwise it is a run's checkpoint."""
  names = (*_IN_DIRECTORY, *_INDICES)
  return not path.is_dir() or any((path / name).exists() for name in names)


def read_file(
  path: pathlib.Path, *, raw: bool = False, key: str | None = None
) -> Found:
  """Reads weights from a file, or from a directory of `save_pretrained`.

  Args:
    path: a `.safetensors` file; a directory with a `model.safetensors` or a
      `pytorch_model.bin`; or a PyTorch checkpoint, either a dictionary of
      tensors or a trainer's, with one of the keys that this module lists. Of a
      detector, the backbone is read.
    raw: whether to prefer the weights themselves to their moving average.
    key: the key of a dictionary, a prefix of tensor names, or both, e.g.
      "state.model".

  Raises:
    OSError: the file cannot be opened.
    ValueError: the file has no weights, or is damaged.
  """
  path = _file_in(path)
  prefix = ""
  if path.suffix == ".safetensors":
    found = Selected(None, (), read_safetensors(path))
  elif key is None:
    keys = (*_AVERAGES * (not raw), *_WEIGHTS)
    found = read_first(path, keys, or_only=True)
  else:
    found = read_first(path, _leading_keys(key))
  if key is not None:
    prefix = key.removeprefix(found.key or "").removeprefix(".")
  try:
    inner = unwrapped(_below(found.tensors, prefix), raw=raw)
    tensors = [*inner.tensors.values(), *inner.heads.values()]
    # Copying overlapping tensors can take any amount of memory.
    if sum(x.nbytes for x in tensors) > path.stat().st_size:
      raise ValueError("it has tensors that overlap")
    check_element_count(sum(x.size for x in tensors))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  stem = "" if found.key is None else f"{found.key}."
  others = (f"{stem}{x}".removesuffix(".") for x in inner.others)
  without_prefix = [
    x for x in found.tensors if prefix and not x.startswith(f"{prefix}.")
  ]
  return Found(
    inner.tensors,
    key or found.key,
    (*inner.left_out, *without_prefix),
    inner.prefixes,
    (*found.others, *others),
    any(map(is_average, (key or found.key or "", *inner.prefixes))),
    inner.heads,
  )


def _file_in(path: pathlib.Path) -> pathlib.Path:
  """Returns the path, or the file of weights if it is a directory."""
  names = _IN_DIRECTORY if path.is_dir() else ()
  file = next((path / x for x in names if (path / x).exists()), path)
  indices = [x for x in _INDICES if (path / x).exists() or path.name == x]
  if file == path and indices:
    raise ValueError(
      f"{path} has its weights in several files ({indices[0]}): save them as"
      " one, with max_shard_size of save_pretrained"
    )
  if file.exists() and not file.is_file():
    raise ValueError(f"{file} is not a file")
  return file


def _leading_keys(key: str) -> list[str]:
  """Returns "a.b.c", "a.b" and "a"; the rest may be a prefix of names."""
  parts = key.split(".")
  return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _below(
  tensors: dict[str, np.ndarray], prefix: str
) -> dict[str, np.ndarray]:
  """Returns the tensors whose names have a prefix, and removes the prefix."""
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
  """Writes a file or directory atomically.

  A failure leaves nothing behind, not even new parent directories.

  Yields:
    The path to write to, which is renamed to `path` at the end.

  Raises:
    FileExistsError: `path` exists and is not an empty directory.
  """
  is_empty = path.is_dir() and not any(path.iterdir())
  if os.path.lexists(path) and not is_empty:
    raise FileExistsError(f"{path} exists and is not overwritten")
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
      with suppress(OSError):  # Another process may have written files there.
        parent.rmdir()
    if isinstance(error, OSError) and error.errno:
      error.filename = str(path)  # Not the partial file, which is removed.
    raise
