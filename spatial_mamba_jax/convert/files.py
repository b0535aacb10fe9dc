"""Weights in files, under the authors' tensor names."""

import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_jax.convert.torch_checkpoint import read_first

SAFETENSORS = "model.safetensors"
_BACKBONE = "backbone."


class Found(NamedTuple):
  """What a file holds.

  Attributes:
    state_dict: {the authors' tensor name: array}.
    key: the dictionary of the file that was taken, where it has several.
    left_out: names of tensors that belong to a detector around the backbone.
  """

  state_dict: dict[str, np.ndarray]
  key: str | None = None
  left_out: tuple[str, ...] = ()


def is_of_weights(path: pathlib.Path) -> bool:
  """Whether `read_file` takes the path; it is no checkpoint of a run then."""
  return not path.is_dir() or (path / SAFETENSORS).exists()


def read_file(path: pathlib.Path, *, raw: bool = False) -> Found:
  """Reads weights from a file, or from a directory of `save_pretrained`.

  Args:
    path: a `.safetensors` file; a directory with a `model.safetensors`; or
      PyTorch's checkpoint of the authors' trainer (`model_ema`, `model`), of
      mmdetection or mmsegmentation (`state_dict`, of which what stands below
      `backbone.` is taken), or of tensors alone.
    raw: whether to take `model` even where there is a `model_ema`.

  Raises:
    OSError: the file cannot be opened.
    ValueError: it holds no weights, or is damaged.
    ImportError: safetensors is needed and missing.
  """
  path = path / SAFETENSORS if path.is_dir() else path
  if path.suffix == ".safetensors":
    key, tensors = None, read_safetensors(path)
  else:
    keys = (
      ("model", "state_dict") if raw else ("model_ema", "model", "state_dict")
    )
    key, tensors = read_first(path, keys)
  # Of tensors that overlap, a few bytes could become any number when copied.
  if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
    raise ValueError(f"{path} has tensors that overlap")
  backbone = {
    name.removeprefix(_BACKBONE): tensor
    for name, tensor in tensors.items()
    if name.startswith(_BACKBONE)
  }
  if not backbone:
    return Found(tensors, key)
  left_out = (name for name in tensors if not name.startswith(_BACKBONE))
  return Found(backbone, key, tuple(left_out))


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """{tensor name: array} of a safetensors file.

  Raises:
    OSError: the file cannot be opened.
    ValueError: it is damaged.
    ImportError: safetensors is missing.
  """
  safetensors = _safetensors()
  path.open("rb").close()  # Tells more of a missing file than it would.
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is damaged, or no safetensors: {error}"
    ) from error


def write_safetensors(
  path: pathlib.Path, state_dict: Mapping[str, np.ndarray]
) -> None:
  """Writes tensors in PyTorch's layout.

  Raises:
    ImportError: safetensors is missing.
  """
  # What reads by layout looks for this word.
  _safetensors().numpy.save_file(
    dict(state_dict), path, metadata={"format": "pt"}
  )


@contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path to write to, which becomes `path` once all is written.

  Raises:
    FileExistsError: `path` exists, and is no empty directory.
  """
  is_empty = path.is_dir() and not any(path.iterdir())
  if os.path.lexists(path) and not is_empty:
    raise FileExistsError(f"{path} exists, and is left as it is")
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    dir=path.parent, prefix=f".{path.name}."
  ) as directory:
    part = pathlib.Path(directory) / path.name
    yield part
    part.rename(path)


def _safetensors() -> Any:
  try:
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "safetensors is needed to read or write such files: pip install"
      " safetensors"
    ) from error
  return safetensors
