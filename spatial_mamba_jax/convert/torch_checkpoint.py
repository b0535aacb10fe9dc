"""Reads PyTorch's checkpoint files without PyTorch.

A checkpoint is a zip archive with a pickle and the bytes of its tensors. No
code in the pickle is run: see `torch_pickle`.
"""

import io
import math
import os
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.torch_pickle import (
  Dictionary,
  FormatError,
  Inert,
  Tensor,
  describe,
  shown,
  unpickle,
)

# Magic number of the format before PyTorch 1.6, after the pickle protocol.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
# Maximum size in bytes of the list of records, and of the pickle.
_MAX_INDEX = 2**26
# Maximum size in bytes of all tensors of a file: `MAX_ELEMENTS` of
# `safetensors_file`, in double precision.
_MAX_BYTES = 2**33
_DTYPES = {
  "torch.DoubleStorage": np.float64,
  "torch.FloatStorage": np.float32,
  "torch.HalfStorage": np.float16,
  "torch.BFloat16Storage": ml_dtypes.bfloat16,
  "torch.LongStorage": np.int64,
  "torch.IntStorage": np.int32,
  "torch.ShortStorage": np.int16,
  "torch.CharStorage": np.int8,
  "torch.ByteStorage": np.uint8,
  "torch.BoolStorage": np.bool_,
  # Types of tensors in untyped storages.
  "torch.uint16": np.uint16,
  "torch.uint32": np.uint32,
  "torch.uint64": np.uint64,
}


def read_torch_checkpoint(
  path: str | os.PathLike[str], key: str = "model"
) -> dict[str, np.ndarray]:
  """Reads the tensors in a file that `torch.save` wrote.

      state_dict = read_torch_checkpoint("tiny.pth", key="model_ema")

  Neither PyTorch nor the code that the file names is needed. No code of the
  file is run.

  Args:
    path: the file, of PyTorch 1.6 or newer.
    key: the key of a dictionary in the file, e.g. "model_ema" or "state_dict",
      or "state.model" for a nested one. It is ignored if the file itself is a
      dictionary of tensors.

  Returns:
    {tensor name: read-only array}. Tensors that share memory in PyTorch share
    it here. Python scalars become arrays without axes.

  Raises:
    OSError: the file cannot be opened.
    ValueError: the file is damaged, has another format or no such key, or the
      key has values other than tensors, or more than 8 GiB of tensors.
  """
  return read_first(path, (key,)).tensors


class Selected(NamedTuple):
  """One dictionary of a file.

  Attributes:
    key: its key; None if the file itself is a dictionary of tensors.
    others: the keys of the file's other dictionaries of tensors.
    tensors: {name: array}.
  """

  key: str | None
  others: tuple[str, ...]
  tensors: dict[str, np.ndarray]


def read_first(
  path: str | os.PathLike[str], keys: Sequence[str], *, or_only: bool = False
) -> Selected:
  """Reads the tensors of the first key that a file has.

  Args:
    path: the file.
    keys: the keys, in order of preference.
    or_only: whether a file with none of the keys, but with a single dictionary
      of tensors, is read as well.

  Raises:
    OSError, ValueError: see `read_torch_checkpoint`.
  """
  with _File(path) as file:
    try:
      archive = _Archive(file)
      contents = unpickle(archive.record("data.pkl"))
      key, others, entries = _select(contents, keys, or_only)
      file.allowed = archive.allowed = _MAX_BYTES
      tensors = {name: _array(name, x, archive) for name, x in entries.items()}
      return Selected(key, others, tensors)
    except FormatError as error:
      raise ValueError(f"{os.fspath(path)}: {error}") from error
    except MemoryError as error:
      raise ValueError(
        f"{os.fspath(path)} needs more memory than this machine has"
      ) from error
    except Exception as error:
      # A malformed file makes the parsers raise many types of errors.
      raise ValueError(
        f"{os.fspath(path)} is damaged, or not a checkpoint of PyTorch"
        f" ({type(error).__name__}: {shown(error)})"
      ) from error


class _File(io.BufferedReader):
  """A file that limits the size of a single read.

  Attributes:
    allowed: the limit, in bytes.
  """

  def __init__(self, path: str | os.PathLike[str]):
    super().__init__(io.FileIO(path))
    self.allowed = _MAX_INDEX

  def read(self, size: int | None = -1) -> bytes:
    if size is not None and size > self.allowed:
      raise FormatError(
        f"asks for {size:,} bytes at once; at most {self.allowed:,} are allowed"
      )
    return super().read(size)


class _Archive:
  """The records of a zip file that `torch.save` wrote.

  Attributes:
    allowed: the number of bytes that may still be read.
  """

  def __init__(self, file: _File):
    if _LEGACY_MAGIC in file.read(32):
      raise FormatError(
        "is in the format of PyTorch before 1.6, which runs code when it is"
        " read: load it with torch.load and rewrite it with torch.save"
      )
    if not zipfile.is_zipfile(file):
      raise FormatError(
        "is not a zip archive, as torch.save writes it, or its end is missing"
      )
    self._zip = zipfile.ZipFile(file)
    self._records: dict[str, bytes] = {}
    self.allowed = _MAX_INDEX
    infos = self._zip.infolist()
    names = [info.filename for info in infos]
    roots = [name for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
      raise FormatError(
        f"has {len(roots)} records data.pkl, where torch.save writes one"
      )
    self._root = roots[0].removesuffix("data.pkl")
    if f"{self._root}constants.pkl" in names:
      raise FormatError("is a TorchScript program, not a checkpoint")
    if len(set(names)) < len(names):
      raise FormatError("has two records of one name")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
      raise FormatError("is compressed, which torch.save never does")
    if sum(info.file_size for info in infos) > file.seek(0, os.SEEK_END):
      raise FormatError("has records that overlap or are cut off")
    if f"{self._root}byteorder" in names:
      order = self.record("byteorder")
      if order != b"little":
        raise FormatError(f"has the byte order {shown(order)}, not 'little'")

  def size(self, name: str) -> int:
    """Returns the size of a record in bytes, without reading it."""
    return self._info(name).file_size

  def record(self, name: str) -> bytes:
    """Returns a record, and checks its checksum."""
    if name not in self._records:
      info = self._info(name)
      self.allowed -= info.file_size
      if self.allowed < 0:
        raise FormatError(
          f"has larger records than are allowed: {shown(name)} has"
          f" {info.file_size:,} bytes"
        )
      data = self._zip.read(info)
      if len(data) != info.file_size:
        raise FormatError(f"has only a part of its record {shown(name)}")
      self._records[name] = data
    return self._records[name]

  def _info(self, name: str) -> zipfile.ZipInfo:
    try:
      return self._zip.getinfo(self._root + name)
    except KeyError:
      raise FormatError(f"lacks its record {shown(name)}") from None


def _select(
  value: Any, keys: Sequence[str], or_only: bool
) -> tuple[str | None, tuple[str, ...], dict[str, Any]]:
  """Selects a dictionary; returns the fields of `Selected`, tensors unread."""
  if not isinstance(value, Dictionary):
    raise FormatError(
      f"holds {describe(value)}, not a dictionary of tensors: save a"
      " model's state_dict()"
    )
  entries = _entries(value)
  named = [key for key, x in entries.items() if _has_tensors(x)]
  found = {key: x for key in keys if (x := _inside(entries, key)) is not None}
  # A dictionary without tensors is the second choice.
  first = next((key for key, x in found.items() if _has_tensors(x)), None)
  if first is None:
    first = next(iter(found), None)
  if first is None and or_only and len(named) == 1:
    (first,) = named
    found[first] = entries[first]
  if first is not None:
    others = tuple(key for key in named if key != first)
    return first, others, _entries(found[first])
  kinds = {type(x) for x in entries.values()}
  if Tensor in kinds and Dictionary not in kinds:
    return None, (), entries
  raise FormatError(
    f"has no dictionary {' or '.join(map(shown, keys))}; its keys are"
    f" {', '.join(map(shown, list(entries)[:12])) or 'none'}"
    + ", ..." * (len(entries) > 12)
    + "".join(
      f"; {shown(key)} is {describe(entries[key])}, not a dictionary"
      + ": save its state_dict()" * isinstance(entries[key], Inert)
      for key in keys
      if key in entries
    )
    + f"; --key can be one of {listed(named)}" * bool(or_only and named)
  )


def _inside(entries: dict[str, Any], key: str) -> Dictionary | None:
  """Returns the dictionary at a key, or at nested keys "outer.inner"."""
  if isinstance(found := entries.get(key), Dictionary):
    return found
  outer, _, inner = key.partition(".")
  if inner and isinstance(found := entries.get(outer), Dictionary):
    return _inside(_entries(found), inner)
  return None


def _has_tensors(value: Any) -> bool:
  return isinstance(value, Dictionary) and any(
    isinstance(x, Tensor) for _, x in value.pairs
  )


def _entries(dictionary: Dictionary) -> dict[str, Any]:
  return {key: x for key, x in dictionary.pairs if isinstance(key, str)}


def _array(name: str, value: Any, archive: _Archive) -> np.ndarray:
  """Returns a tensor as a view of its record, or a scalar as an array."""
  if isinstance(value, bool | int | float):
    return np.asarray(value, np.int64 if type(value) is int else None)
  if not isinstance(value, Tensor):
    raise FormatError(f"{shown(name)} is {describe(value)}, not a plain tensor")
  storage, dtype = value.storage, _DTYPES.get(value.dtype)
  if dtype is None:
    raise FormatError(
      f"{shown(name)} is of type {shown(value.dtype)}, which is not supported"
    )
  itemsize = np.dtype(dtype).itemsize
  record = f"data/{storage.record}"
  size = archive.size(record)
  is_untyped = storage.kind == "torch.storage.UntypedStorage"
  if size != storage.elements * (1 if is_untyped else itemsize):
    raise FormatError(
      f"the record of {shown(name)} has {size} bytes, which do not match"
      f" {shown(storage.elements)} elements"
    )
  if _end(value) * itemsize > size:
    raise FormatError(
      f"{shown(name)} reaches beyond its storage: offset"
      f" {value.offset}, size {value.size}, stride {value.stride} of"
      f" {storage.elements} elements"
    )
  if 0 in value.size:
    return np.empty(value.size, dtype)
  return np.ndarray(
    value.size,
    dtype,
    buffer=archive.record(record),
    offset=value.offset * itemsize,
    strides=[
      # An axis of one element may claim any stride.
      step * itemsize * (n > 1)
      for n, step in zip(value.size, value.stride, strict=True)
    ],
  )


def _end(tensor: Tensor) -> int:
  """Returns the index after the last element of the storage in use."""
  if not math.prod(tensor.size):
    return 0
  last = sum(
    (n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True)
  )
  return tensor.offset + last + 1
