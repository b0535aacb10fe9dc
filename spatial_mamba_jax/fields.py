"""Dataclasses whose fields know what they accept.

A field has a type, its annotation, and a requirement: the bounds of `number`,
or the names of `choice`. One without either is bounded by the machine alone.

    @dataclasses.dataclass
    class OptimizerConfig(Section):
      learning_rate: float = number(5e-4, above=0)
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from spatial_mamba_jax.errors import UserError

# Largest finite float32, in which all is computed.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
# Smallest float32 above 0 that a device does not flush to 0.
FLOAT32_TINY = 2.0**-126
# Largest float32 below 1; what is closer to 1 is rounded to it.
FLOAT32_BELOW_1 = 1 - 2.0**-24
# Weights of losses, decays and the like: far more than any is, and a product of
# some of them is finite in float32.
MAX_WEIGHT = 10**6
# Largest int32, in which steps, labels and indices are counted.
INT32_MAX = 2**31 - 1

_LONGEST = 80  # Characters of a value in a message.
# (value) -> what it must be instead, "" where it is accepted.
_Requirement = Callable[[Any], str]


def number(
  default: Any = dataclasses.MISSING,
  *,
  least: int | float | None = None,
  above: int | float | None = None,
  most: int | float | None = None,
  below: int | float | None = None,
) -> Any:
  """A field of a number, or of a tuple of them, with bounds.

  Args:
    default: the field's default; required where it has none.
    least: smallest accepted value.
    above: exclusive lower bound.
    most: largest accepted value.
    below: exclusive upper bound.

  A bound that is not given is that of int32, or of finite float32 where the
  default is a float.
  """
  largest = FLOAT32_MAX if isinstance(default, float) else INT32_MAX
  if least is None and above is None:
    least = -largest
  if most is None and below is None:
    most = largest

  def requirement(value: Any) -> str:
    if isinstance(value, tuple | list):
      return next(filter(None, map(requirement, value)), "")
    if not isinstance(value, int | float):
      return ""  # None, where the annotation has it.
    if value != value:
      return "a number"
    if above is not None and value <= above:
      return f"above {above}"
    if least is not None and value < least:
      return f"at least {least}"
    if below is not None and value >= below:
      return f"below {below}"
    if most is not None and value != most:
      # Where infinity is accepted, what only rounds to it is not.
      largest_finite = min(most, FLOAT32_MAX)
      if value > largest_finite:
        return f"at most {largest_finite}"
    return ""

  return _field(default, requirement)


def choice(
  default: Any = dataclasses.MISSING,
  *,
  among: Iterable[str] | Callable[[], Iterable[str]],
) -> Any:
  """A field of one of several names; a callable is asked at each check."""

  def requirement(value: Any) -> str:
    names = tuple(among() if callable(among) else among)
    if value is None or value in names:
      return ""
    return f"one of {', '.join(name or 'empty' for name in names)}"

  return _field(default, requirement)


def _field(default: Any, requirement: _Requirement) -> Any:
  return dataclasses.field(
    default=default, metadata={"requirement": requirement}
  )


class Section:
  """A dataclass of a config that checks itself, and the sections in it.

  A subclass whose fields depend on one another overrides `validate`: it calls
  this one first, then `require`.
  """

  mistake: ClassVar[type[UserError]] = UserError

  def validate(self, path: str = "config") -> None:
    """Checks every field: its type, then its requirement.

    Args:
      path: what a message calls this section.

    Raises:
      UserError: of the class `mistake`; it names the first wrong field.
    """
    check_fields(self, path, self.mistake)

  def require(self, accepted: bool, path: str, field: str, what: str) -> None:
    """Raises where a field's value is not accepted; `what` it must be."""
    if not accepted:
      raise self.mistake(
        f"{path}.{field} must be {what}, got {show(getattr(self, field))}"
      )


def check_fields(
  instance: Any, path: str = "", mistake: type[UserError] = UserError
) -> None:
  """Checks every field of a dataclass: its type, then its requirement.

  Args:
    instance: the dataclass.
    path: what a message calls it; empty for the fields' names alone.
    mistake: the class of what is raised.

  Raises:
    UserError: naming the first wrong field.
  """
  prefix = f"{path}." if path else ""
  fields = {field.name: field for field in dataclasses.fields(instance)}
  for name in getattr(instance, "__dict__", {}):
    if name not in fields:
      raise mistake(f"{prefix}{name}: no such field{suggestion(name, fields)}")
  annotations = typing.get_type_hints(type(instance))
  for name, field in fields.items():
    if not hasattr(instance, name):
      raise mistake(f"{prefix}{name} is missing")
    value, annotation = getattr(instance, name), annotations[name]
    if not _is_a(value, annotation):
      what = type_name(annotation)
    else:
      by_machine = number(0 if annotation is int else 0.0).metadata
      requirement = {**by_machine, **field.metadata}["requirement"]
      what = requirement(value)
    if what:
      raise mistake(f"{prefix}{name} must be {what}, got {show(value)}")
  for name in fields:
    value = getattr(instance, name)
    if isinstance(value, Section):
      value.validate(prefix + name)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
      check_fields(value, prefix + name, mistake)


def suggestion(name: str, names: Iterable[str]) -> str:
  """The end of a message about a name that is none of `names`."""
  if near := nearest(name, names):
    return f"; did you mean {near}?"
  return f"; choose from {', '.join(names)}"


def nearest(name: str, names: Iterable[str]) -> str:
  """Which of the names was meant; empty where none is like it."""
  return next(iter(difflib.get_close_matches(name, names, 1, 0.5)), "")


def show(value: Any) -> str:
  """A value as a message has it, not too long."""
  if dataclasses.is_dataclass(value):
    kind = value if isinstance(value, type) else type(value)
    return f"{'the class' if kind is value else 'a'} {kind.__name__}"
  try:
    text = repr(value)
  except Exception:  # Such as that of an int of more than 4,300 digits.
    return f"a value of type {type(value).__name__}"
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def type_name(annotation: Any) -> str:
  """What a message calls the values of a type."""
  arguments = typing.get_args(annotation)
  match typing.get_origin(annotation):
    case typing.Union | types.UnionType:
      return " or ".join(map(type_name, arguments))
    case typing.Literal:
      return f"one of {', '.join(map(str, arguments))}"
    case builtin if builtin is tuple:
      if arguments[1:] == (...,):
        return f"a tuple, each {type_name(arguments[0])}"
      return f"a tuple of {len(arguments)}, each {type_name(arguments[0])}"
  names = {
    bool: "True or False",
    float: "a number",
    int: "an integer",
    str: "a text",
    types.NoneType: "None",
  }
  return names.get(annotation, f"a {getattr(annotation, '__name__', 'value')}")


def _is_a(value: Any, annotation: Any) -> bool:
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return any(_is_a(value, argument) for argument in arguments)
  if origin is tuple:
    if not isinstance(value, tuple | list):
      return False
    if arguments[1:] == (...,):
      arguments = arguments[:1] * len(value)
    return len(value) == len(arguments) and all(map(_is_a, value, arguments))
  if origin is typing.Literal:
    return value in arguments
  if annotation in (int, float):
    accepted = (int, float) if annotation is float else int
    return isinstance(value, accepted) and not isinstance(value, bool)
  if annotation is str:
    return isinstance(value, str) and _fits_a_file_name(value)
  kind = origin or annotation
  if kind is Any or not isinstance(kind, type):
    return True
  return isinstance(value, kind)


def _fits_a_file_name(text: str) -> bool:
  # Every text of a config is a name or a path.
  try:
    return "\0" not in os.fsdecode(os.fsencode(text))
  except UnicodeError:
    return False
