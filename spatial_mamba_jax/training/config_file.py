"""Config files, and overrides of their fields: wrong ones end in one line."""

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

# The module that a config file becomes: its dataclasses look themselves up.
_MODULE = "spatial_mamba_jax_config_file"
_LONGEST = 400  # Characters of an exception's message.


def load_config(file: str) -> TrainConfig:
  """Runs a config file, and calls its `get_config`.

  Args:
    file: its path; what follows a colon is given to `get_config`.

  Raises:
    TrainingError: anything else came of it; with the file's line, where there
      is one.
  """
  path, *argument = [file] if os.path.isfile(file) else file.split(":", 1)
  path = pathlib.Path(os.path.expanduser(path))
  if not path.is_file():
    raise TrainingError(f"--config={file} is no file")
  module = types.ModuleType(_MODULE)
  module.__file__ = str(path)
  sys.modules[_MODULE] = module
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
  # A file can raise anything, and exit.
  except BaseException as error:
    where = ":".join(map(str, (path, *_line(error, module))))
    raise TrainingError(f"{where}: {_reason(error)}") from error


def _source(path: pathlib.Path) -> str:
  """The text of a file; a SyntaxError where it is none."""
  encoded, text = path.read_bytes(), ""
  try:
    text = importlib.util.decode_source(encoded)
    end, reason = text.find("\0"), "a NUL byte is no text"
  except (SyntaxError, UnicodeDecodeError) as error:
    # The former is of the first lines, which can name an encoding.
    end, reason = getattr(error, "start", 0), f"{error}; write it in UTF-8"
  if end < 0:
    return text
  line = encoded.count(b"\n", 0, end) + 1
  raise SyntaxError(reason, (str(path), line, None, None))


def _line(error: BaseException, module: types.ModuleType) -> list[int]:
  """The innermost line of the file that led to an error, if any."""
  path = module.__file__
  if isinstance(error, SyntaxError) and error.filename == path:
    return [error.lineno] if error.lineno else []
  lines = [
    line
    for frame, line in traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename == path
  ]
  if not lines and isinstance(error, TypeError | TrainingError):
    # It was called in the wrong way, or returned what is wrong.
    code = getattr(getattr(module, "get_config", None), "__code__", None)
    lines = [code.co_firstlineno] if code else []
  return lines[-1:]


def _reason(error: BaseException) -> str:
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
    names = {name for kind in _sections(Section) for name in _names_of(kind)}
    if near := nearest(match[1], names):
      text += f"; did you mean {near}?"
  return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _sections(kind: type) -> Iterator[type]:
  """Every kind of section that has been imported."""
  for section in kind.__subclasses__():
    yield section
    yield from _sections(section)


def _names_of(section: type) -> list[str]:
  return [x.name for x in dataclasses.fields(section)]


def overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
  """(flag, path of the field) of the arguments that override a field."""
  for argument in arguments:
    if match := re.match(r"(--?(?:no)?config\.([^=]*))", argument):
      yield match[1], match[2]


def check_overrides(config: TrainConfig, arguments: Sequence[str]) -> None:
  """Raises a TrainingError for an override of what is no single field."""
  for flag, path in overrides(arguments):
    value = config
    for name in path.split("."):
      names = _names(value)
      if name not in names:
        if not names:
          config.validate()  # What should be a section may be wrong.
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
  """What a message calls the values of the field at a path."""
  *parents, name = path.split(".")
  section = functools.reduce(getattr, parents, config)
  return type_name(typing.get_type_hints(type(section))[name])


def _names(section: Any) -> list[str]:
  """The names of a section's fields; none of what is no section."""
  if not dataclasses.is_dataclass(section) or isinstance(section, type):
    return []
  return [field.name for field in dataclasses.fields(section)]


def _paths(section: Any, prefix: str = "") -> Iterator[str]:
  """The paths of all fields that are no sections."""
  for name in _names(section):
    value = getattr(section, name, None)
    if _names(value):
      yield from _paths(value, f"{prefix}{name}.")
    else:
      yield prefix + name
