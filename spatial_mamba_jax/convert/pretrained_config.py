"""Writes the config.json of a directory of weights; reads and checks it."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
from spatial_mamba_kernels import IMPLEMENTATIONS

from spatial_mamba_jax.convert.architecture import Architecture, Heads
from spatial_mamba_jax.convert.families import FAMILIES, TITLES
from spatial_mamba_jax.convert.json_text import parse_json
from spatial_mamba_jax.convert.messages import listed, short
from spatial_mamba_jax.convert.preprocessor_file import (
  PREPROCESSOR,
  read_preprocessor,
)
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.mixers import MIXERS, MixerConfig

CONFIG = "config.json"
_NAMES = {names.family.name: names for names in FAMILIES}
_MAX_BYTES = 2**20  # Maximum size of the file.
# Largest integer of a field: `safetensors_file.MAX_ELEMENTS`, which bounds the
# elements of a file of weights.
_MAX_INTEGER = 2**30
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class _Rule(NamedTuple):
  """A requirement on the value of a field.

  Attributes:
    accepts: whether it accepts a value from JSON.
    text: the requirement in words, for a message.
  """

  accepts: Callable[[Any], bool]
  text: str


def _one_of(*values: Any) -> _Rule:
  text = ", ".join(json.dumps(x) for x in values)
  # Types are compared as well, because 1 == True.
  return _Rule(
    lambda x: any(type(x) is type(y) and x == y for y in values),
    f"one of {text}",
  )


def _is_integer(value: Any, low: int) -> bool:
  return type(value) is int and low <= value <= _MAX_INTEGER


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, Real) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _integer() -> _Rule:
  return _Rule(
    lambda x: _is_integer(x, 1), f"an integer of 1 to {_MAX_INTEGER}"
  )


def _number(text: str, accepts: Callable[[Any], bool]) -> _Rule:
  return _Rule(lambda x: _is_number(x) and accepts(x), f"a number {text}")


def _integers(low: int) -> _Rule:
  return _Rule(
    lambda x: (
      isinstance(x, list) and bool(x) and all(_is_integer(i, low) for i in x)
    ),
    f"a list of integers of {low} to {_MAX_INTEGER}",
  )


_RULES = {
  "dims": _integers(1),
  "depths": _integers(1),
  "out_indices": _integers(0),
  "num_classes": _integer(),
  "head_channels": _integer(),
  "auxiliary_channels": _integer(),
  "d_state": _integer(),
  "expand": _integer(),
  "mlp_ratio": _number("over 0, up to 1000", lambda x: 0 < x <= 1000),
  "drop_path_rate": _number("of 0 or more, below 1", lambda x: 0 <= x < 1),
  "dtype": _one_of(*_DTYPES),
  "in_channels": _integer(),
  "implementation": _one_of(None, *IMPLEMENTATIONS),
  "layer_implementation": _one_of(None, "xla"),
  "remat": _one_of(None, True, False),
  "mixer": _one_of(*MIXERS),
  "gate": _one_of(True, False),
  "conv_bias": _one_of(True, False),
  "aligned": _one_of(True, False),
  "head_dim": _integer(),
  "heads": _integer(),
  "threshold": _number("from 0 to 2", lambda x: 0 <= x <= 2),
  "model_type": _one_of(*_NAMES),
  "id2label": _Rule(
    lambda x: (
      isinstance(x, dict) and all(isinstance(y, str) for y in x.values())
    ),
    "a name for each class",
  ),
  "architectures": _Rule(
    lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x),
    "a list of names",
  ),
}


def config_text(architecture: Architecture, class_name: str) -> str:
  """Returns the content of a config.json."""
  config, out_indices, heads, _ = architecture
  fields = flat_fields(config)
  if type(config.mixer) is not _NAMES[fields["model_type"]].mixer:
    fields["mixer"] = config.mixer.name
  # The best implementation depends on the device of the reader.
  fields.pop("implementation", None)
  del fields["layer_implementation"]
  fields["dtype"] = jnp.dtype(config.dtype).name
  if out_indices:  # A backbone has no classes.
    del fields["num_classes"]
    fields["out_indices"] = out_indices
  if heads:
    fields |= heads._asdict()
  if config.class_names:
    fields["id2label"] = dict(enumerate(config.class_names))
  kind = fields.pop("model_type")
  head = {"architectures": [class_name], "model_type": kind}
  return json.dumps({**head, **fields}, indent=2) + "\n"


def read_config(
  path: pathlib.Path, overrides: Mapping[str, Any]
) -> Architecture:
  """Reads a config.json.

  Args:
    path: the file.
    overrides: values that replace those in the file, and are checked likewise.

  Raises:
    OSError: the file cannot be opened.
    ValueError: the file is not JSON, or a field is unknown, missing or wrong.
  """
  try:
    fields = parse_json(_read(path))
    _check(fields, overrides)
    for name in ("dims", "depths", "out_indices"):
      fields[name] = tuple(fields.get(name, ()))
    fields["class_names"] = _class_names(fields.pop("id2label", {}))
    fields["preprocessing"] = read_preprocessor(path.with_name(PREPROCESSOR))
    fields["dtype"] = jnp.dtype(fields.get("dtype", "float32"))
    out_indices = fields.pop("out_indices")
    stages = len(fields["dims"])
    if any(i >= stages for i in out_indices):
      raise ValueError(f"out_indices {out_indices} exceed the {stages} stages")
    kind = _mixer_of(fields)
    fields["family"] = _NAMES[fields["model_type"]].family
    fields["mixer"] = kind(**_fields_of(kind, fields))
    config = ModelConfig(**_fields_of(ModelConfig, fields))
    return Architecture(config, out_indices, _heads(fields))
  except ValueError as error:
    raise ValueError(f"{path} is not of a {TITLES}: {error}") from error


def _class_names(names: Mapping[str, str]) -> tuple[str, ...]:
  try:
    return tuple(names[str(i)] for i in range(len(names)))
  except KeyError as error:
    raise ValueError(f"id2label has no name of class {error}") from error


def _heads(fields: Mapping[str, Any]) -> Heads | None:
  found = [fields[name] for name in Heads._fields if name in fields]
  if not found:
    return None
  if len(found) < len(Heads._fields):
    raise ValueError(f"a segmentor has both {' and '.join(Heads._fields)}")
  if fields.get("out_indices"):
    raise ValueError("a segmentor has no out_indices")
  return Heads(*found)


def flat_fields(config: ModelConfig) -> dict[str, Any]:
  """Returns the fields of an architecture and its mixer in one dictionary."""
  fields = dataclasses.asdict(config)
  # The first has a file of its own, and the second another form.
  del fields["preprocessing"], fields["class_names"]
  mixer_fields = fields.pop("mixer")
  fields["model_type"] = fields.pop("family").name
  return {**fields, **mixer_fields}


def _fields_of(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the entries of `fields` that are fields of a dataclass."""
  names = {field.name for field in dataclasses.fields(kind)}
  return {name: value for name, value in fields.items() if name in names}


def _read(path: pathlib.Path) -> bytes:
  if path.exists() and not path.is_file():
    raise IsADirectoryError(f"{path} is not a file")
  with path.open("rb") as file:
    text = file.read(_MAX_BYTES + 1)
  if len(text) > _MAX_BYTES:
    raise ValueError(f"it is longer than {_MAX_BYTES:,} bytes")
  return text


def _check(fields: Any, overrides: Mapping[str, Any]) -> None:
  """Adds the overrides to the fields and checks all fields."""
  if not isinstance(fields, dict):
    raise ValueError("it is not a dictionary")
  kind = fields.get("model_type")
  if not (isinstance(kind, str) and kind in _NAMES):
    raise ValueError(f"its model_type is not {' or '.join(_NAMES)}")
  rules = _rules(_mixer_of(fields))
  for name, value in overrides.items():
    fields[name] = _dtype_name(value) if name == "dtype" else value
  for name, value in fields.items():
    if name not in rules:
      raise ValueError(
        f"unknown field {short(name)}: choose from {listed(rules, 20)}"
      )
    if not rules[name].accepts(value):
      raise ValueError(
        f"{name} must be {rules[name].text}, not {short(repr(value))}"
      )
  for name in ("dims", "depths"):
    if name not in fields:
      raise ValueError(f"it has no {name}")


def _mixer_of(fields: Mapping[str, Any]) -> type[MixerConfig]:
  """Returns the kind of the mixer: by default, of the family's authors."""
  own = _NAMES[fields["model_type"]].mixer
  name = fields.get("mixer")
  return type(MIXERS[name]) if isinstance(name, str) and name in MIXERS else own


def _rules(mixer: type[MixerConfig]) -> dict[str, _Rule]:
  """Returns the rules without those for fields that a mixer lacks."""
  others = {
    x for kind in MIXERS.values() for x in _fields_of(type(kind), _RULES)
  }
  lacking = others - _fields_of(mixer, _RULES).keys()
  return {name: rule for name, rule in _RULES.items() if name not in lacking}


def _dtype_name(dtype: Any) -> Any:
  """Returns the name of a type; returns any other value unchanged."""
  try:
    return dtype if dtype is None else jnp.dtype(dtype).name
  except TypeError:
    return dtype
