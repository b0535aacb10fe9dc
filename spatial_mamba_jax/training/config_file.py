"""Runs config files, and checks the overrides of their fields."""

import dataclasses
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from spatial_mamba_jax.errors import UserError, one_line
from spatial_mamba_jax.fields import Section, nearest, show, type_name
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.experiment import RENAMED

# Name of a config file's module. It must be in sys.modules, where dataclasses
# of the file look it up.
_MODULE = "spatial_mamba_jax_config_file"
# An installed package has `configs/` here; a checkout has it one level above.
_PACKAGE = pathlib.Path(__file__).parents[1]
# Maximum length of an exception's message, in characters.
_MAX_REASON = 400


def load_config(file: str) -> TrainConfig:
  """Runs a config file and calls its `get_config`.

  Args:
    file: the path. Text after a colon is the argument of `get_config`.

  Raises:
    TrainingError: the file does not return a config; the message has the line
      of the file where it failed.
  """
  name, *argument = [file] if os.path.isfile(file) else file.split(":", 1)
  path = _find(name)
  if path is None:
    raise TrainingError(f"--config={file} is not a file")
  module = types.ModuleType(_MODULE)
  module.__file__ = str(path)
  sys.modules[_MODULE] = module
  # One config imports another as `configs.NAME`.
  sys.path.append(str(path.absolute().parents[1]))
  try:
    exec(compile(_source(path), str(path), "exec"), module.__dict__)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config) or inspect.iscoroutinefunction(get_config):
      raise TrainingError("it has no plain function get_config()")
    config = get_config(*argument)
    if not isinstance(config, TrainConfig):
      raise TrainingError(
        f"get_config() must return a TrainConfig, got {show(config)}"
      )
    return config
  except KeyboardInterrupt:
    raise
  # A file can raise anything, also SystemExit.
  except BaseException as error:
    where = ":".join(map(str, (path, *_line(error, module))))
    raise TrainingError(f"{where}: {_reason(error)}") from error
  finally:
    sys.path.pop()


def _find(name: str) -> pathlib.Path | None:
  """Returns a config file, of this machine or of the installed package."""
  path = pathlib.Path(os.path.expanduser(name))
  found = (x for x in (path, _PACKAGE / path) if x.is_file())
  return next(found, None)


def _source(path: pathlib.Path) -> str:
  """Returns the text of a file; raises a SyntaxError where it is not text."""
  encoded, text = path.read_bytes(), ""
  try:
    text = importlib.util.decode_source(encoded)
    end, reason = text.find("\0"), "a NUL byte is not text"
  except (SyntaxError, UnicodeDecodeError) as error:
    # A SyntaxError is about the encoding that the first lines declare.
    end, reason = getattr(error, "start", 0), f"{error}; write it in UTF-8"
  if end < 0:
    return text
  line = encoded.count(b"\n", 0, end) + 1
  raise SyntaxError(reason, (str(path), line, None, None))


def _line(error: BaseException, module: types.ModuleType) -> list[int]:
  """Returns the innermost line of the file that led to an error, if any."""
  path = module.__file__
  if isinstance(error, SyntaxError) and error.filename == path:
    return [error.lineno] if error.lineno else []
  lines = [
    line
    for frame, line in traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename == path
  ]
  if not lines and isinstance(error, TypeError | TrainingError):
    # The arguments or the result of `get_config` are wrong.
    code = getattr(getattr(module, "get_config", None), "__code__", None)
    lines = [code.co_firstlineno] if code else []
  return lines[-1:]


def _reason(error: BaseException) -> str:
  """Returns the type and message of an error, with a hint at a misspelling."""
  try:
    text = one_line(error.msg if isinstance(error, SyntaxError) else error)
  except Exception:  # Its own str() fails.
    text = ""
  name = type(error).__name__
  if not isinstance(error, UserError) and text != name:
    text = f"{name}: {text}" if text else name
  if match := re.search(r"unexpected keyword argument '(\w+)'", text):
    renamed = {old.rpartition(".")[2]: new for old, (new, _) in RENAMED.items()}
    if match[1] in renamed:
      return f"{text}; it is config.{renamed[match[1]]} now"
    sections = _subclasses(Section)
    names = {x.name for kind in sections for x in dataclasses.fields(kind)}
    if near := nearest(match[1], names):
      text += f"; did you mean {near}?"
  return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def _subclasses(kind: type) -> Iterator[type]:
  """Yields every subclass of a section that has been imported."""
  for section in kind.__subclasses__():
    yield section
    yield from _subclasses(section)


def overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields (flag, path of the field) for each override of a field."""
  for argument in arguments:
    if match := re.match(r"(--?(?:no)?config\.([^=]*))", argument):
      yield match[1], match[2]


def check_overrides(config: TrainConfig, arguments: Sequence[str]) -> None:
  """Raises a TrainingError where an override does not name a field."""
  for flag, path in overrides(arguments):
    value = config
    for name in path.split("."):
      names = _names(value)
      if name not in names:
        if not names:
          config.validate()  # A section may have a value of another type.
        near = RENAMED.get(path, ("",))[0]
        near = near or nearest(path, list(_paths(config)))
        what = (
          f"did you mean --config.{near}?"
          if near
          else f"choose from {', '.join(names)}"
        )
        raise TrainingError(f"{flag}: no such field; {what}")
      value = getattr(value, name, None)
    if names := _names(value):
      raise TrainingError(
        f"{flag} is a section; override its fields {', '.join(names)}"
      )


def expected(config: TrainConfig, path: str) -> str:
  """Returns what a message calls the values of the field at a path."""
  *parents, name = path.split(".")
  section = functools.reduce(getattr, parents, config)
  return type_name(typing.get_type_hints(type(section))[name])


def _names(section: Any) -> list[str]:
  """Returns the names of a section's fields; [] for any other value."""
  if not dataclasses.is_dataclass(section) or isinstance(section, type):
    return []
  return [field.name for field in dataclasses.fields(section)]


def _paths(section: Any, prefix: str = "") -> Iterator[str]:
  """Yields the paths of all fields that are not sections."""
  for name in _names(section):
    value = getattr(section, name, None)
    if _names(value):
      yield from _paths(value, f"{prefix}{name}.")
    else:
      yield prefix + name
