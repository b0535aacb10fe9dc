"""A reader of PyTorch's pickles that runs no code from them.

Python's unpickler calls any function that the pickle names. This reader
executes a few opcodes, which build tensors, dictionaries, lists and scalars. An
inert placeholder stands for every other object. It imports nothing.

`pickle.Unpickler` with a restricted `find_class` would not be safe: a few
hostile bytes make it reserve gigabytes (by the index of a memo entry) or
overflow the stack of the process (by the hash of a deeply nested key).
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from spatial_mamba_jax.convert.messages import short

# Maximum number of opcodes. A training checkpoint of the base model has about
# 200,000.
_MAX_OPCODES = 1_000_000


class FormatError(Exception):
  """A file cannot be read. The message follows the name of the file."""


class Inert(NamedTuple):
  """A placeholder for an object that is not created."""

  name: str


class Global(NamedTuple):
  """A class or function that the pickle names."""

  name: str


class Dictionary(NamedTuple):
  """The items of a dictionary, in insertion order.

  It is not a dict, because hashing a hostile key can take minutes or overflow
  the stack.
  """

  pairs: list[tuple[Any, Any]]


class Storage(NamedTuple):
  """The memory of tensors: its type, its record in the file and its length."""

  kind: str
  record: str
  elements: int


class Tensor(NamedTuple):
  """A strided view of a storage; offset and strides count elements."""

  storage: Storage
  dtype: str
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


# Opcodes that push their argument.
_LITERALS = frozenset((
  "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
  "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
  "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
  "BINSTRING", "SHORT_BINSTRING",
))  # fmt: skip
# Opcodes that push a constant or a new container.
_CONSTRUCTORS: dict[str, Callable[[], Any]] = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_DICT": lambda: Dictionary([]),
  "EMPTY_SET": lambda: Inert("set"),
}


def unpickle(data: bytes) -> Any:
  """Returns what a pickle describes, with placeholders for its calls.

  Raises:
    FormatError: the pickle is too long or has an opcode that is not supported.
    Exception: of any type, where the pickle is malformed.
  """
  stack: list[Any] = []
  marked: list[list[Any]] = []  # The stacks below each MARK.
  memo: dict[int, Any] = {}
  argument: Any
  opcodes = pickletools.genops(data)
  for count, (opcode, argument, _) in enumerate(opcodes):
    if count >= _MAX_OPCODES:
      raise FormatError("has a longer pickle than any checkpoint needs")
    match opcode.name:
      case "PROTO" | "FRAME" | "STOP":
        pass
      case name if name in _LITERALS:
        stack.append(argument)
      case name if name in _CONSTRUCTORS:
        stack.append(_CONSTRUCTORS[name]())
      case "BINPUT" | "LONG_BINPUT":
        memo[argument] = stack[-1]
      case "MEMOIZE":
        memo[len(memo)] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[argument])
      case "MARK":
        marked.append(stack)
        stack = []
      case "TUPLE" | "APPENDS" | "SETITEMS" | "ADDITEMS" | "FROZENSET" as name:
        items, stack = stack, marked.pop()
        _take_items(name, items, stack)
      case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
        items = [stack.pop() for _ in range(int(name[-1]))]
        stack.append(tuple(reversed(items)))
      case "APPEND":
        _extend(stack[-2], [stack.pop()])
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        _update(stack[-1], [key, value])
      case name:
        _execute_call(name, argument, stack)
  return stack.pop()


def _take_items(opcode: str, items: list[Any], stack: list[Any]) -> None:
  """Executes an opcode that takes all items above a MARK."""
  match opcode:
    case "TUPLE":
      stack.append(tuple(items))
    case "APPENDS":
      _extend(stack[-1], items)
    case "SETITEMS":
      _update(stack[-1], items)
    case "FROZENSET":
      stack.append(Inert("frozenset"))


def _execute_call(opcode: str, argument: Any, stack: list[Any]) -> None:
  """Executes an opcode of globals, storages or calls."""
  match opcode:
    case "GLOBAL":
      stack.append(Global(argument.replace(" ", ".", 1)))
    case "STACK_GLOBAL":
      name, module = stack.pop(), stack.pop()
      stack.append(Global(f"{_identifier(module)}.{_identifier(name)}"))
    case "BINPERSID":
      stack.append(_storage(stack.pop()))
    case "REDUCE":
      arguments, function = stack.pop(), stack.pop()
      stack.append(_call(function, arguments))
    case "NEWOBJ":
      stack.pop()
      stack.append(Inert(_name(stack.pop())))
    case "NEWOBJ_EX":
      del stack[-2:]
      stack.append(Inert(_name(stack.pop())))
    case "BUILD":
      stack.pop()  # The attributes of the object below.
    case _:
      raise FormatError(f"has a pickle with {opcode}, which is not supported")


def _extend(target: Any, items: list[Any]) -> None:
  if isinstance(target, list):
    target.extend(items)
  elif not isinstance(target, Inert):
    raise FormatError(f"appends to {describe(target)}")


def _update(target: Any, items: list[Any]) -> None:
  if isinstance(target, Dictionary):
    target.pairs.extend(zip(items[::2], items[1::2], strict=True))
  elif not isinstance(target, Inert):
    raise FormatError(f"sets items of {describe(target)}")


def _storage(identifier: Any) -> Storage:
  match identifier:
    case ("storage", Global(kind), str(record), _, int(count)) | (
      "storage",
      Global(kind),
      str(record),
      _,
      int(count),
      None,
    ):
      return Storage(kind, record, count)
  raise FormatError("has a persistent id that is not a storage")


def _rebuild_tensor(storage, offset, size, stride, *rest):
  for axes in (size, stride):
    if not isinstance(axes, tuple) or len(axes) != len(size) or len(axes) > 64:
      raise FormatError("has a tensor with a malformed size or stride")
  if not all(
    type(x) is int and 0 <= x < 2**63 for x in (offset, *size, *stride)
  ):
    raise FormatError("has a tensor with a malformed size, stride or offset")
  if not isinstance(storage, Storage):
    raise FormatError("has a tensor without a storage")
  # The last argument says whether the view conjugates or negates values.
  if any(isinstance(x, Dictionary) and x.pairs for x in rest[2:]):
    return Inert("a conjugated or negated view")
  kind = storage.kind
  if len(rest) > 2 and isinstance(rest[2], Global):
    kind = rest[2].name
  return Tensor(storage, kind, offset, size, stride)


# The functions that a pickle may call, with their replacements. The parameter
# functions return the tensor of the parameter.
_CALLS: dict[str, Callable[..., Any]] = {
  "collections.OrderedDict": lambda: Dictionary([]),
  "collections.defaultdict": lambda *_: Dictionary([]),
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
    return Inert(name)
  # Each call copies the tuple, and a pickle can pass the same one many times.
  if not isinstance(arguments, tuple) or len(arguments) > 16:
    raise FormatError(f"calls {name} with other arguments than torch.save")
  return _CALLS[name](*arguments)


def _name(function: Any) -> str:
  return function.name if isinstance(function, Global) else describe(function)


def _identifier(value: Any) -> str:
  # A pickle can join the same long string to others many times.
  if not isinstance(value, str) or len(value) > 256:
    raise FormatError("has a class whose name is malformed")
  return value


def describe(value: Any) -> str:
  """Describes a value of the pickle in a message, after "is" or "holds"."""
  if isinstance(value, Inert | Global):
    return shown(value.name)
  kind = type(value).__name__.lower()
  return "None" if value is None else f"a {kind}"


def shown(value: Any) -> str:
  """Returns a value as `short` does, with strings in quotation marks."""
  return short(ascii(value) if isinstance(value, str | bytes) else value)
