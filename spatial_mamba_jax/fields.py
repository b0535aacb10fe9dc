"""Dataclasses whose fields check their values.

The annotation of a field gives its type. `number` adds bounds, and `choice` the
accepted names. A number without bounds must fit an int32 or a finite float32.

    @dataclasses.dataclass
    class OptimizerConfig(Section):
      learning_rate: float = number(5e-4, above=0)
"""

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from spatial_mamba_jax.errors import UserError

# Largest finite float32. All results are float32.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
# Smallest normal float32; devices flush smaller ones to 0.
FLOAT32_TINY = 2.0**-126
# Largest float32 below 1; values closer to 1 round to 1.
FLOAT32_BELOW_1 = 1 - 2.0**-24
# Upper bound of loss weights, weight decay and the like: far above any useful
# value, and the product of several is finite in float32.
MAX_WEIGHT = 10**6
# Largest int32, the type of steps, labels and indices.
INT32_MAX = 2**31 - 1

_MAX_SHOWN = 80  # Maximum length of a value in a message, in characters.
# Maps a value to what it must be instead; to "" where it is accepted.
_Requirement = Callable[[Any], str]


def number(
  default: Any = dataclasses.MISSING,
  *,
  least: int | float | None = None,
  above: int | float | None = None,
  most: int | float | None = None,
  below: int | float | None = None,
) -> Any:
  """Creates a field for a number, or for a tuple of numbers, with bounds.

  Args:
    default: the default; without it the field is required.
    least: smallest accepted value.
    above: exclusive lower bound.
    most: largest accepted value.
    below: exclusive upper bound.

  Where a bound is missing, the range of int32 is the bound, or the range of
  finite float32 if the default is a float.
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
      return ""  # None, which the annotation allows.
    if value != value:
      return "a number"
    if above is not None and value <= above:
      return f"above {above}"
    if least is not None and value < least:
      return f"at least {least}"
    if below is not None and value >= below:
      return f"below {below}"
    if most is not None and value != most:
      # Infinity may be accepted, but not a finite value that rounds to it.
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
  """Creates a field for one of several names.

  Args:
    default: the default; without it the field is required.
    among: the names, or a function that returns them at each check.
  """

  def requirement(value: Any) -> str:
    names = tuple(among() if callable(among) else among)
    if value is None or value in names:
      return ""
    return f"one of {', '.join(name or 'empty' for name in names)}"

  return _field(default, requirement)


@functools.cache
def _unbounded(is_int: bool) -> _Requirement:
  """Returns the requirement of a field that states none."""
  return number(0 if is_int else 0.0).metadata["requirement"]


def _field(default: Any, requirement: _Requirement) -> Any:
  return dataclasses.field(
    default=default, metadata={"requirement": requirement}
  )


class Section:
  """A section of a config: a dataclass that checks its fields and subsections.

  A subclass whose fields depend on one another overrides `validate`, calls
  `super().validate` first, and then `require`.
  """

  mistake: ClassVar[type[UserError]] = UserError

  def validate(self, path: str = "config") -> None:
    """Checks every field: its type, then its requirement.

    Args:
      path: the name of this section in messages.

    Raises:
      UserError: a field is wrong; the class of the error is `mistake`.
    """
    check_fields(self, path, self.mistake)

  def require(self, accepted: bool, path: str, field: str, what: str) -> None:
    """Raises an error that the field must be `what`, unless `accepted`."""
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
    path: the name of the dataclass in messages; empty for none.
    mistake: the class of the error.

  Raises:
    UserError: a field is wrong, missing or unknown.
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
      requirement = field.metadata.get("requirement")
      what = (requirement or _unbounded(annotation is int))(value)
    if what:
      raise mistake(f"{prefix}{name} must be {what}, got {show(value)}")
  for name in fields:
    value = getattr(instance, name)
    if isinstance(value, Section):
      value.validate(prefix + name)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
      check_fields(value, prefix + name, mistake)


def suggestion(name: str, names: Iterable[str]) -> str:
  """Returns the end of a message about a name that is not among `names`."""
  if near := nearest(name, names):
    return f"; did you mean {near}?"
  return f"; choose from {', '.join(names)}"


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns the most similar of the names; "" where none is similar."""
  return next(iter(difflib.get_close_matches(name, names, 1, 0.5)), "")


def show(value: Any) -> str:
  """Returns the representation of a value for a message, truncated."""
  if dataclasses.is_dataclass(value):
    kind = value if isinstance(value, type) else type(value)
    return f"{'the class' if kind is value else 'a'} {kind.__name__}"
  try:
    text = repr(value)
  except Exception:  # For example, an int of more than 4,300 digits.
    return f"a value of type {type(value).__name__}"
  return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def type_name(annotation: Any) -> str:
  """Returns what a message calls the values of a type, e.g. "a number"."""
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
    str: "a string",
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
  # Every string of a config is a name or a path.
  try:
    return "\0" not in os.fsdecode(os.fsencode(text))
  except UnicodeError:
    return False
