"""The config.json of a directory of weights: written, and checked when read."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import jax.numpy as jnp
from spatial_mamba_kernels import IMPLEMENTATIONS

from spatial_mamba_jax.convert.json_text import parse_json
from spatial_mamba_jax.convert.messages import listed, short
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.mixers import StructureAwareConfig

CONFIG = "config.json"
_MODEL_TYPE = "spatial_mamba"
_MAX_BYTES = 2**20
# More than any file of weights can hold (`safetensors_file.MAX_NUMBERS`).
_MAX_NUMBER = 2**30
_DTYPES = ("float32", "bfloat16", "float16", "float64")


class _Rule(NamedTuple):
  """What a field may be.

  Attributes:
    takes: whether it takes a value of JSON.
    words: the same for a message.
  """

  takes: Callable[[Any], bool]
  words: str


def _one_of(*values: Any) -> _Rule:
  words = ", ".join(json.dumps(x) for x in values)
  # Not by `in`: 1 equals true.
  return _Rule(
    lambda x: any(type(x) is type(y) and x == y for y in values),
    f"one of {words}",
  )


def _is_integer(value: Any, low: int) -> bool:
  return type(value) is int and low <= value <= _MAX_NUMBER


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, Real) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def _integer() -> _Rule:
  return _Rule(lambda x: _is_integer(x, 1), f"an integer of 1 to {_MAX_NUMBER}")


def _integers(low: int) -> _Rule:
  return _Rule(
    lambda x: (
      isinstance(x, list) and bool(x) and all(_is_integer(i, low) for i in x)
    ),
    f"a list of integers of {low} to {_MAX_NUMBER}",
  )


_RULES = {
  "dims": _integers(1),
  "depths": _integers(1),
  "out_indices": _integers(0),
  "num_classes": _integer(),
  "d_state": _integer(),
  "expand": _integer(),
  "mlp_ratio": _Rule(
    lambda x: _is_number(x) and 0 < x <= 1000, "a number over 0, up to 1000"
  ),
  "drop_path_rate": _Rule(
    lambda x: _is_number(x) and 0 <= x < 1, "a number of 0 or more, below 1"
  ),
  "dtype": _one_of(*_DTYPES),
  "in_channels": _integer(),
  "implementation": _one_of(None, *IMPLEMENTATIONS),
  "layer_implementation": _one_of(None, "xla"),
  "remat": _one_of(None, True, False),
  "model_type": _one_of(_MODEL_TYPE),
  "architectures": _Rule(
    lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x),
    "a list of names",
  ),
}


def config_text(
  config: ModelConfig, out_indices: tuple[int, ...], class_name: str
) -> str:
  """What `read_config` reads."""
  fields = flat_fields(config)
  # What is best depends on the device.
  del fields["implementation"], fields["layer_implementation"]
  fields["dtype"] = jnp.dtype(config.dtype).name
  if out_indices:
    del fields["num_classes"]
    fields["out_indices"] = out_indices
  head = {"architectures": [class_name], "model_type": _MODEL_TYPE}
  return json.dumps({**head, **fields}, indent=2) + "\n"


def read_config(
  path: pathlib.Path, overrides: Mapping[str, Any]
) -> tuple[ModelConfig, tuple[int, ...]]:
  """The architecture, and the stages whose features a backbone returns.

  Args:
    path: the file.
    overrides: fields that replace the file's, of the same rules.

  Raises:
    OSError: the file cannot be opened.
    ValueError: it is no JSON, or a field is unknown, missing or wrong.
  """
  try:
    fields = parse_json(_read(path))
    _check(fields, overrides)
    for name in ("dims", "depths", "out_indices"):
      fields[name] = tuple(fields.get(name, ()))
    fields["dtype"] = jnp.dtype(fields.get("dtype", "float32"))
    out_indices = fields.pop("out_indices")
    stages = len(fields["dims"])
    if any(i >= stages for i in out_indices):
      raise ValueError(f"out_indices {out_indices} are not of {stages} stages")
    mixer = StructureAwareConfig(**_taken(fields, StructureAwareConfig))
    config = ModelConfig(mixer=mixer, **_taken(fields, ModelConfig))
    return config, out_indices
  except ValueError as error:
    raise ValueError(f"{path} is of no Spatial-Mamba: {error}") from error


def flat_fields(config: ModelConfig) -> dict[str, Any]:
  """The fields of an architecture and of its mixer, in one dictionary."""
  fields = dataclasses.asdict(config)
  of_mixer = fields.pop("mixer")
  return {**fields, **of_mixer}


def _taken(fields: dict[str, Any], kind: type) -> dict[str, Any]:
  names = {field.name for field in dataclasses.fields(kind)}
  return {name: value for name, value in fields.items() if name in names}


def _read(path: pathlib.Path) -> bytes:
  if path.exists() and not path.is_file():
    raise IsADirectoryError(f"{path} is no file")
  with path.open("rb") as file:
    text = file.read(_MAX_BYTES + 1)
  if len(text) > _MAX_BYTES:
    raise ValueError(f"it is longer than {_MAX_BYTES:,} bytes")
  return text


def _check(fields: Any, overrides: Mapping[str, Any]) -> None:
  """Puts the overrides in and checks every field."""
  if not isinstance(fields, dict):
    raise ValueError("it is no dictionary")
  if fields.get("model_type") != _MODEL_TYPE:
    raise ValueError(f"its model_type is not {_MODEL_TYPE}")
  for name, value in overrides.items():
    fields[name] = _dtype_name(value) if name == "dtype" else value
  for name, value in fields.items():
    if name not in _RULES:
      raise ValueError(
        f"unknown field {short(name)}: choose from {listed(_RULES, 20)}"
      )
    if not _RULES[name].takes(value):
      raise ValueError(
        f"{name} must be {_RULES[name].words}, not {short(repr(value))}"
      )
  for name in ("dims", "depths"):
    if name not in fields:
      raise ValueError(f"it has no {name}")


def _dtype_name(dtype: Any) -> Any:
  """Of what JAX takes as one; anything else as it is."""
  try:
    return dtype if dtype is None else jnp.dtype(dtype).name
  except TypeError:
    return dtype
