"""A machine that reads PyTorch's pickles without running them.

To unpickle is to call whatever the pickle names, so that is not done: a machine
of a few opcodes builds tensors, dictionaries, lists and numbers, and puts an
inert placeholder wherever the pickle wants anything else made. Nothing is
imported and nothing is called.

`pickle.Unpickler` with another `find_class` would not do: a few hostile bytes
make it reserve gigabytes (the index of a memo entry) or overflow the stack of
its process (the hash of a deeply nested key).
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from spatial_mamba_jax.convert.messages import short

# A training checkpoint of the base model has some 200,000.
_MAX_OPCODES = 1_000_000


class FormatError(Exception):
  """What is wrong with a file, to be told after its name."""


class Inert(NamedTuple):
  """In place of what is not made."""

  name: str


class Global(NamedTuple):
  """A class or function that the pickle names."""

  name: str


class Dictionary(NamedTuple):
  """Pairs in the order in which they were set.

  No dict, because a hostile key can take minutes or the stack to hash.
  """

  pairs: list[tuple[Any, Any]]


class Storage(NamedTuple):
  """The memory of tensors: its type, its record, its number of elements."""

  kind: str
  record: str
  elements: int


class Tensor(NamedTuple):
  """A view of a storage, in elements of `dtype`."""

  storage: Storage
  dtype: str
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


def unpickle(data: bytes) -> Any:
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
      raise FormatError("has a longer pickle than any checkpoint needs")
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
        stack.append(Dictionary([]))
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        _update(stack[-1], [key, value])
      case "SETITEMS":
        items = pop_to_mark()
        _update(stack[-1], items)
      case "EMPTY_SET":
        stack.append(Inert("set"))
      case "ADDITEMS":
        pop_to_mark()
      case "FROZENSET":
        pop_to_mark()
        stack.append(Inert("frozenset"))
      case "GLOBAL":
        stack.append(Global(argument.replace(" ", ".", 1)))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        stack.append(Global(f"{_text(module)}.{_text(name)}"))
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
        stack.pop()  # The attributes of what is then on top.
      case name:
        raise FormatError(f"has a pickle with {name}, which is not read")
  return stack.pop()


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
  raise FormatError("has a persistent id that is no storage's")


def _rebuild_tensor(storage, offset, size, stride, *rest):
  for axes in (size, stride):
    if not isinstance(axes, tuple) or len(axes) != len(size) or len(axes) > 64:
      raise FormatError("has a tensor whose size or stride is not one")
  if not all(
    type(x) is int and 0 <= x < 2**63 for x in (offset, *size, *stride)
  ):
    raise FormatError("has a tensor whose size, stride or offset is not one")
  if not isinstance(storage, Storage):
    raise FormatError("has a tensor without a storage")
  # Of `rest`, the last says whether values are to be conjugated or negated.
  if any(isinstance(x, Dictionary) and x.pairs for x in rest[2:]):
    return Inert("a conjugated or negated view")
  kind = storage.kind
  if len(rest) > 2 and isinstance(rest[2], Global):
    kind = rest[2].name
  return Tensor(storage, kind, offset, size, stride)


# What is called, each by a function of this file. A Parameter is its tensor.
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
  # A tuple of many could be passed again and again, and each time be copied.
  if not isinstance(arguments, tuple) or len(arguments) > 16:
    raise FormatError(f"calls {name} with other arguments than torch.save")
  return _CALLS[name](*arguments)


def _name(named: Any) -> str:
  return named.name if isinstance(named, Global) else describe(named)


def _text(value: Any) -> str:
  # Long ones could be joined again and again.
  if not isinstance(value, str) or len(value) > 256:
    raise FormatError("has a class of a wrong name")
  return value


def describe(value: Any) -> str:
  """What a value of the pickle is, after "is" or "holds"."""
  if isinstance(value, Inert | Global):
    return shown(value.name)
  kind = type(value).__name__.lower()
  return "None" if value is None else f"a {kind}"


def shown(value: Any) -> str:
  """As `short`, text between quotation marks."""
  return short(ascii(value) if isinstance(value, str | bytes) else value)
