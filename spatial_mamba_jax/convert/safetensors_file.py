"""Reads safetensors files with NumPy; writes them with their own package.

A file has the length of a header, the header in JSON, and the bytes of the
tensors. The header is checked against the file before an array is created.
Arrays are views of the memory-mapped file, so that only those in use are read.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from spatial_mamba_jax.convert.json_text import parse_json
from spatial_mamba_jax.convert.messages import short

# Maximum length of a header in bytes. The base model's has 90,000.
_MAX_HEADER = 2**23
# Maximum number of elements in all tensors of a file, eleven times the base
# model's.
MAX_ELEMENTS = 2**30
_MAX_AXES = 8
_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a safetensors file.

  Returns:
    {tensor name: read-only array}. The arrays are views of the file, which must
    not be changed while they are in use.

  Raises:
    OSError: the file cannot be opened.
    ValueError: the file is damaged, or has a type that is not supported.
  """
  with path.open("rb") as file:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise ValueError(
        f"{path} is damaged, or not a safetensors file: its header should have"
        f" {short(length)} bytes, and the file has {size}"
      )
    if length > _MAX_HEADER:
      raise ValueError(
        f"{path} has a header of {length:,} bytes; at most {_MAX_HEADER:,} are"
        " allowed"
      )
    try:
      header = parse_json(file.read(length))
      tensors = _entries(header, size - 8 - length)
    except ValueError as error:
      raise ValueError(
        f"{path} is damaged, or of a kind that is not supported: {error}"
      ) from error
    data: Any = b""
    if size > 8 + length:
      try:
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
      except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
  return {
    name: np.ndarray(shape, dtype, data, begin)
    if math.prod(shape)
    else np.empty(shape, dtype)
    for name, (dtype, shape, begin) in tensors.items()
  }


def write_safetensors(
  path: pathlib.Path, state_dict: Mapping[str, np.ndarray]
) -> None:
  """Writes tensors, which are in PyTorch's layout.

  Raises:
    ImportError: safetensors is missing.
    OSError: the file cannot be written.
  """
  safetensors = import_safetensors()
  path.touch()
  mode = path.stat().st_mode & 0o777
  try:
    # Readers such as transformers require this entry, which names the layout.
    safetensors.numpy.save_file(
      dict(state_dict), path, metadata={"format": "pt"}
    )
  except safetensors.SafetensorError as error:
    # The package has the system's error number in its message: (os error 28).
    if code := re.search(r"os error (\d+)", str(error)):
      number = int(code[1])
      raise OSError(number, os.strerror(number), str(path)) from error
    raise OSError(f"{path} cannot be written: {error}") from error
  path.chmod(mode)  # The package makes the file private to its owner.


def import_safetensors() -> Any:
  """Imports safetensors; returns the package.

  Raises:
    ImportError: the package is missing.
  """
  try:
    import safetensors.numpy
  except ImportError as error:
    raise ImportError(
      "safetensors is needed to write such files: pip install safetensors"
    ) from error
  return safetensors


def check_element_count(count: int) -> None:
  """Raises a ValueError where a file has more elements than any model."""
  if count > MAX_ELEMENTS:
    raise ValueError(
      f"it has {count:,} elements; at most {MAX_ELEMENTS:,} are allowed"
    )


_Entry = tuple[Any, tuple[int, ...], int]


def _entries(header: Any, size: int) -> dict[str, _Entry]:
  """Parses the header of a file with `size` bytes of tensors.

  Returns:
    {name: (type, shape, first byte)}.
  """
  if not isinstance(header, dict):
    raise ValueError("its header is not a dictionary")
  header.pop("__metadata__", None)
  tensors, spans = {}, []
  for name, entry in header.items():
    dtype, shape, (begin, end) = _entry(name, entry)
    if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
      raise ValueError(
        f"{short(name)} has {short(end - begin)} bytes, which do not match its"
        f" shape {list(shape)}"
      )
    tensors[name] = dtype, shape, begin
    spans.append((begin, end, name))
  at = 0
  for begin, end, name in sorted(spans):
    if begin != at:
      raise ValueError(
        f"{short(name)} begins at byte {short(begin)}, and the tensor before it"
        f" ends at {short(at)}"
      )
    at = end
  if at != size:
    raise ValueError(
      f"its tensors have {short(at)} bytes, and the file has {size} for them"
    )
  check_element_count(sum(math.prod(shape) for _, shape, _ in tensors.values()))
  return tensors


def _entry(name: str, entry: Any) -> tuple[Any, tuple[int, ...], list[int]]:
  match entry:
    case {
      "dtype": str(dtype),
      "shape": list(shape),
      "data_offsets": list(ends),
    }:
      pass
    case _:
      raise ValueError(f"{short(name)} has no type, shape and offsets")
  if dtype not in _DTYPES:
    raise ValueError(
      f"{short(name)} is of type {short(dtype)}, which is not supported"
    )
  if len(shape) > _MAX_AXES or not all(map(_is_size, shape)):
    raise ValueError(f"{short(name)} has a wrong shape: {short(shape[:9])}")
  # Without zeros: NumPy refuses an empty array with huge other axes.
  check_element_count(math.prod(filter(None, shape)))
  if len(ends) != 2 or not all(map(_is_size, ends)):
    raise ValueError(f"{short(name)} has wrong offsets: {short(ends[:3])}")
  return _DTYPES[dtype], tuple(shape), ends


def _is_size(value: Any) -> bool:
  return type(value) is int and 0 <= value < 2**62
