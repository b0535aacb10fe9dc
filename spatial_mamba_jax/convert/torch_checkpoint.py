"""PyTorch's checkpoint files, read with NumPy alone.

A checkpoint is a zip archive of a pickle and of the bytes of its tensors. To
unpickle is to call whatever the pickle names, so that is not done: a machine of
a few opcodes builds tensors, dictionaries, lists and numbers, and puts an inert
placeholder wherever the pickle wants anything else made. Nothing is imported
and nothing is called.

`pickle.Unpickler` with another `find_class` would not do: a few hostile bytes
make it reserve gigabytes (the index of a memo entry) or overflow the stack of
its process (the hash of a deeply nested key).
"""

import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from spatial_mamba_jax.convert.messages import listed

# How the format before PyTorch 1.6 begins, after the number of its protocol.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
# A training checkpoint of the base model has some 200,000.
_MAX_OPCODES = 1_000_000
# Bytes of what is read before it is known what it claims: the list of records,
# and the pickle.
_MAX_INDEX = 2**26
# Bytes of all tensors that are read of a file: those of `safetensors_file.MAX_NUMBERS`
# numbers in double precision.
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
  # Of untyped storages, whose tensors name their type themselves.
  "torch.uint16": np.uint16,
  "torch.uint32": np.uint32,
  "torch.uint64": np.uint64,
}


def read_torch_checkpoint(
  path: str | os.PathLike[str], key: str = "model"
) -> dict[str, np.ndarray]:
  """The tensors in a file that `torch.save` wrote.

      state_dict = read_torch_checkpoint("tiny.pth", key="model_ema")

  Neither PyTorch is needed nor the code that the file names; none of it runs.

  Args:
    path: the file, of PyTorch 1.6 or newer.
    key: which of the file's dictionaries, e.g. "model_ema" or "state_dict", or
      "state.model" for one inside another. A file that is itself a dictionary
      of tensors has no such keys, and is read as it is.

  Returns:
    {tensor name: read-only array}. Tensors that share memory in PyTorch share
    it here. Numbers become arrays without axes.

  Raises:
    OSError: the file cannot be opened.
    ValueError: it is damaged, of another format, has no such key, or what the
      key names are not tensors, or more than 8 GiB of them.
  """
  return read_first(path, (key,)).tensors


class Selected(NamedTuple):
  """One dictionary of a file.

  Attributes:
    key: its key, None for a file that is itself a dictionary of tensors.
    others: the keys of the file's other dictionaries of tensors.
    tensors: {name: array}.
  """

  key: str | None
  others: tuple[str, ...]
  tensors: dict[str, np.ndarray]


def read_first(
  path: str | os.PathLike[str], keys: Sequence[str], *, or_only: bool = False
) -> Selected:
  """The first of the keys that is there, and its tensors.

  Args:
    path: as of `read_torch_checkpoint`, which says the rest, too.
    keys: in order of preference.
    or_only: whether, where there is none of them, the only dictionary of
      tensors is taken, whatever its key.
  """
  with _File(path) as file:
    try:
      archive = _Archive(file)
      contents = _unpickle(archive.record("data.pkl"))
      key, others, entries = _select(contents, keys, or_only)
      file.allowed = archive.allowed = _MAX_BYTES
      tensors = {name: _array(name, x, archive) for name, x in entries.items()}
      return Selected(key, others, tensors)
    except _FormatError as error:
      raise ValueError(f"{os.fspath(path)}: {error}") from error
    except MemoryError as error:
      raise ValueError(
        f"{os.fspath(path)} needs more memory than there is"
      ) from error
    except Exception as error:
      # Whatever the parser trips over, the file is what is wrong.
      raise ValueError(
        f"{os.fspath(path)} is damaged, or no checkpoint of PyTorch"
        f" ({type(error).__name__}: {_short(error)})"
      ) from error


class _FormatError(Exception):
  """What is wrong with a file, to be told after its name."""


class _Inert(NamedTuple):
  """In place of what is not made."""

  name: str


class _Global(NamedTuple):
  """A class or function that the pickle names."""

  name: str


class _Dictionary(NamedTuple):
  """Pairs in the order in which they were set.

  No dict, because a hostile key can take minutes or the stack to hash.
  """

  pairs: list[tuple[Any, Any]]


class _Storage(NamedTuple):
  """The memory of tensors: its type, its record, its number of elements."""

  kind: str
  record: str
  elements: int


class _Tensor(NamedTuple):
  """A view of a storage, in elements of `dtype`."""

  storage: _Storage
  dtype: str
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _File(io.BufferedReader):
  """A file whose claims cost no more memory than is allowed at a time.

  Attributes:
    allowed: bytes.
  """

  def __init__(self, path: str | os.PathLike[str]):
    super().__init__(io.FileIO(path))
    self.allowed = _MAX_INDEX

  def read(self, size: int | None = -1) -> bytes:
    if size is not None and size > self.allowed:
      raise _FormatError(
        f"asks for {size:,} bytes at once, of which {self.allowed:,} are"
        " allowed"
      )
    return super().read(size)


class _Archive:
  """The records of a zip file as `torch.save` lays them out.

  Attributes:
    allowed: bytes of records that may still be read.
  """

  def __init__(self, file: _File):
    if _LEGACY_MAGIC in file.read(32):
      raise _FormatError(
        "is in the format of PyTorch before 1.6, which runs code to be read:"
        " load it with torch.load and write it again with torch.save"
      )
    if not zipfile.is_zipfile(file):
      raise _FormatError(
        "is no zip archive, as torch.save writes them, or its end is missing"
      )
    self._zip = zipfile.ZipFile(file)
    self._records: dict[str, bytes] = {}
    self.allowed = _MAX_INDEX
    infos = self._zip.infolist()
    names = [info.filename for info in infos]
    roots = [name for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
      raise _FormatError(
        f"has {len(roots)} records data.pkl, where torch.save writes one"
      )
    self._root = roots[0].removesuffix("data.pkl")
    if f"{self._root}constants.pkl" in names:
      raise _FormatError("is a TorchScript program, and not a checkpoint")
    if len(set(names)) < len(names):
      raise _FormatError("has two records of one name")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
      raise _FormatError("is compressed, which torch.save never does")
    if sum(info.file_size for info in infos) > file.seek(0, os.SEEK_END):
      raise _FormatError("has records that overlap, or are cut off")
    if f"{self._root}byteorder" in names:
      order = self.record("byteorder")
      if order != b"little":
        raise _FormatError(f"has the byte order {_short(order)}, not 'little'")

  def size(self, name: str) -> int:
    """The bytes of a record, which is not read."""
    return self._info(name).file_size

  def record(self, name: str) -> bytes:
    """A record, whose checksum must fit."""
    if name not in self._records:
      info = self._info(name)
      self.allowed -= info.file_size
      if self.allowed < 0:
        raise _FormatError(
          f"has larger records than are read: {_short(name)} is of"
          f" {info.file_size:,} bytes"
        )
      data = self._zip.read(info)
      if len(data) != info.file_size:
        raise _FormatError(f"has half of its record {_short(name)}")
      self._records[name] = data
    return self._records[name]

  def _info(self, name: str) -> zipfile.ZipInfo:
    try:
      return self._zip.getinfo(self._root + name)
    except KeyError:
      raise _FormatError(f"lacks its record {_short(name)}") from None


def _select(
  value: Any, keys: Sequence[str], or_only: bool
) -> tuple[str | None, tuple[str, ...], dict[str, Any]]:
  """As `Selected`, before tensors are read."""
  if not isinstance(value, _Dictionary):
    raise _FormatError(
      f"holds {_describe(value)}, not a dictionary of tensors: save a"
      " model's state_dict()"
    )
  entries = _entries(value)
  named = [key for key, x in entries.items() if _has_tensors(x)]
  found = {key: x for key in keys if (x := _inside(entries, key)) is not None}
  # An empty one is taken where there is nothing better.
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
  if _Tensor in kinds and _Dictionary not in kinds:
    return None, (), entries
  raise _FormatError(
    f"has no dictionary {' or '.join(map(_short, keys))}; its keys are"
    f" {', '.join(map(_short, list(entries)[:12])) or 'none'}"
    + ", ..." * (len(entries) > 12)
    + "".join(
      f"; {_short(key)} is {_describe(entries[key])}, no dictionary: save its"
      " state_dict()"
      for key in keys
      if isinstance(entries.get(key), _Inert | _Global)
    )
    + f"; --key takes one of {listed(named)}" * bool(or_only and named)
  )


def _inside(entries: dict[str, Any], key: str) -> _Dictionary | None:
  """The dictionary of a key, or of "outer.inner" keys."""
  if isinstance(found := entries.get(key), _Dictionary):
    return found
  outer, _, inner = key.partition(".")
  if inner and isinstance(found := entries.get(outer), _Dictionary):
    return _inside(_entries(found), inner)
  return None


def _has_tensors(value: Any) -> bool:
  return isinstance(value, _Dictionary) and any(
    isinstance(x, _Tensor) for _, x in value.pairs
  )


def _entries(dictionary: _Dictionary) -> dict[str, Any]:
  return {key: x for key, x in dictionary.pairs if isinstance(key, str)}


def _array(name: str, value: Any, archive: _Archive) -> np.ndarray:
  if isinstance(value, bool | int | float):
    return np.asarray(value, np.int64 if type(value) is int else None)
  if not isinstance(value, _Tensor):
    raise _FormatError(f"{_short(name)} is {_describe(value)}, no plain tensor")
  storage, dtype = value.storage, _DTYPES.get(value.dtype)
  if dtype is None:
    raise _FormatError(
      f"{_short(name)} is of type {_short(value.dtype)}, which is not read"
    )
  itemsize = np.dtype(dtype).itemsize
  record = f"data/{storage.record}"
  size = archive.size(record)
  is_untyped = storage.kind == "torch.storage.UntypedStorage"
  if size != storage.elements * (1 if is_untyped else itemsize):
    raise _FormatError(
      f"the record of {_short(name)} has {size} bytes, which are not"
      f" {_short(storage.elements)} elements"
    )
  if _end(value) * itemsize > size:
    raise _FormatError(
      f"{_short(name)} reaches beyond its storage: offset"
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


def _end(tensor: _Tensor) -> int:
  """How many elements of its storage a tensor reaches over."""
  if not math.prod(tensor.size):
    return 0
  last = sum(
    (n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True)
  )
  return tensor.offset + last + 1


def _unpickle(data: bytes) -> Any:
  """What a pickle describes, with placeholders for what it wants called."""
  stack: list[Any] = []
  marked: list[list[Any]] = []
  memo: dict[int, Any] = {}
  argument: Any

  def pop_to_mark() -> list[Any]:
    nonlocal stack
    items, stack = stack, marked.pop()
    return items

  opcodes = pickletools.genops(data)
  for count, (opcode, argument, _) in enumerate(opcodes):
    if count >= _MAX_OPCODES:
      raise _FormatError("has a longer pickle than any checkpoint needs")
    match opcode.name:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case (
        "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT"
        | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
        | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
        | "BINSTRING" | "SHORT_BINSTRING"
      ):  # fmt: skip
        stack.append(argument)
      case "BINPUT" | "LONG_BINPUT":
        memo[argument] = stack[-1]
      case "MEMOIZE":
        memo[len(memo)] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[argument])
      case "NONE":
        stack.append(None)
      case "NEWTRUE":
        stack.append(True)
      case "NEWFALSE":
        stack.append(False)
      case "MARK":
        marked.append(stack)
        stack = []
      case "EMPTY_TUPLE":
        stack.append(())
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        items = [stack.pop() for _ in range(int(opcode.name[-1]))]
        stack.append(tuple(reversed(items)))
      case "TUPLE":
        items = tuple(pop_to_mark())
        stack.append(items)
      case "EMPTY_LIST":
        stack.append([])
      case "APPEND":
        _extend(stack[-2], [stack.pop()])
      case "APPENDS":
        items = pop_to_mark()
        _extend(stack[-1], items)
      case "EMPTY_DICT":
        stack.append(_Dictionary([]))
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        _update(stack[-1], [key, value])
      case "SETITEMS":
        items = pop_to_mark()
        _update(stack[-1], items)
      case "EMPTY_SET":
        stack.append(_Inert("set"))
      case "ADDITEMS":
        pop_to_mark()
      case "FROZENSET":
        pop_to_mark()
        stack.append(_Inert("frozenset"))
      case "GLOBAL":
        stack.append(_Global(argument.replace(" ", ".", 1)))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(_Global(f"{_text(module)}.{_text(name)}"))
      case "BINPERSID":
        stack.append(_storage(stack.pop()))
      case "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, arguments))
      case "NEWOBJ":
        stack.pop()
        stack.append(_Inert(_name(stack.pop())))
      case "NEWOBJ_EX":
        del stack[-2:]
        stack.append(_Inert(_name(stack.pop())))
      case "BUILD":
        stack.pop()  # The attributes of what is then on top.
      case name:
        raise _FormatError(f"has a pickle with {name}, which is not read")
  return stack.pop()


def _extend(target: Any, items: list[Any]) -> None:
  if isinstance(target, list):
    target.extend(items)
  elif not isinstance(target, _Inert):
    raise _FormatError(f"appends to {_describe(target)}")


def _update(target: Any, items: list[Any]) -> None:
  if isinstance(target, _Dictionary):
    target.pairs.extend(zip(items[::2], items[1::2], strict=True))
  elif not isinstance(target, _Inert):
    raise _FormatError(f"sets items of {_describe(target)}")


def _storage(identifier: Any) -> _Storage:
  match identifier:
    case ("storage", _Global(kind), str(record), _, int(count)) | (
      "storage",
      _Global(kind),
      str(record),
      _,
      int(count),
      None,
    ):
      return _Storage(kind, record, count)
  raise _FormatError("has a persistent id that is no storage's")


def _rebuild_tensor(storage, offset, size, stride, *rest):
  for axes in (size, stride):
    if not isinstance(axes, tuple) or len(axes) != len(size) or len(axes) > 64:
      raise _FormatError("has a tensor whose size or stride is not one")
  if not all(
    type(x) is int and 0 <= x < 2**63 for x in (offset, *size, *stride)
  ):
    raise _FormatError("has a tensor whose size, stride or offset is not one")
  if not isinstance(storage, _Storage):
    raise _FormatError("has a tensor without a storage")
  # Of `rest`, the last says whether values are to be conjugated or negated.
  if any(isinstance(x, _Dictionary) and x.pairs for x in rest[2:]):
    return _Inert("a conjugated or negated view")
  kind = storage.kind
  if len(rest) > 2 and isinstance(rest[2], _Global):
    kind = rest[2].name
  return _Tensor(storage, kind, offset, size, stride)


# What is called, each by a function of this file. A Parameter is its tensor.
_CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": lambda: _Dictionary([]),
  "collections.defaultdict": lambda *_: _Dictionary([]),
  "torch._utils._rebuild_tensor": _rebuild_tensor,
  "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils._rebuild_tensor_v3": _rebuild_tensor,
  "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
  "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
  "torch._tensor._rebuild_from_type_v2": (
    lambda function, _, arguments, *state: _call(function, arguments)
  ),
}


def _call(function: Any, arguments: Any) -> Any:
  name = _name(function)
  if name not in _CALLS:
    return _Inert(name)
  # A tuple of many could be passed again and again, and each time be copied.
  if not isinstance(arguments, tuple) or len(arguments) > 16:
    raise _FormatError(f"calls {name} with other arguments than torch.save")
  return _CALLS[name](*arguments)


def _name(named: Any) -> str:
  return named.name if isinstance(named, _Global) else _describe(named)


def _text(value: Any) -> str:
  # Long ones could be joined again and again.
  if not isinstance(value, str) or len(value) > 256:
    raise _FormatError("has a class of a wrong name")
  return value


def _describe(value: Any) -> str:
  if isinstance(value, _Inert | _Global):
    return _short(value.name)
  kind = type(value).__name__.removeprefix("_").lower()
  return "None" if value is None else f"a {kind}"


def _short(value: Any) -> str:
  """One line of at most 100 characters, of what may be anything."""
  if isinstance(value, int) and abs(value) >= 2**63:
    return "a huge number"
  text = ascii(value) if isinstance(value, str | bytes) else str(value)
  text = " ".join(text.split())
  return text if len(text) <= 100 else f"{text[:97]}..."
