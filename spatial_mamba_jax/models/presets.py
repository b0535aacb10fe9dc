"""The named architectures, from the configs of their authors."""

import dataclasses
import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import show, suggestion
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.mixers import MIXERS, MixerConfig, SS2DConfig
from spatial_mamba_jax.models.vmamba import VMAMBA


def _vmamba(**fields: Any) -> ModelConfig:
  """Returns an architecture of VMamba's configs vmambav2v."""
  return ModelConfig(family=VMAMBA, mixer=SS2DConfig(), **fields)


_PRESETS = {
  # Ours, for tests and small images.
  "spatial_mamba_micro": ModelConfig(
    dims=(16, 32, 64, 128), depths=(1, 1, 2, 1), num_classes=10
  ),
  "spatial_mamba_tiny": ModelConfig(
    dims=(64, 128, 256, 512), depths=(2, 4, 8, 4), drop_path_rate=0.2
  ),
  "spatial_mamba_small": ModelConfig(
    dims=(64, 128, 256, 512), depths=(2, 4, 21, 5), drop_path_rate=0.3
  ),
  "spatial_mamba_base": ModelConfig(
    dims=(96, 192, 384, 768), depths=(2, 4, 21, 5), drop_path_rate=0.5
  ),
  # Ours, for tests and small images.
  "vmamba_micro": _vmamba(
    dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), num_classes=10
  ),
  "vmamba_tiny": _vmamba(
    dims=(96, 192, 384, 768), depths=(2, 2, 8, 2), drop_path_rate=0.2
  ),
  "vmamba_small": _vmamba(
    dims=(96, 192, 384, 768), depths=(2, 2, 20, 2), drop_path_rate=0.3
  ),
  "vmamba_base": _vmamba(
    dims=(128, 256, 512, 1024), depths=(2, 2, 20, 2), drop_path_rate=0.5
  ),
}


def list_models(filter: str = "*") -> list[str]:
  """Returns the names that `create_model` and `create_backbone` accept.

  Args:
    filter: a pattern as `fnmatch` has it, e.g. "*tiny*".
  """
  return fnmatch.filter(sorted(_PRESETS), filter)


def _plain(value: Any) -> Any:
  """Converts NumPy scalars to Python's, and arrays and lists to tuples."""
  if isinstance(value, np.generic | np.ndarray):
    value = value.tolist()
  # Only plain tuples, because a `Family` is a tuple too.
  return tuple(map(_plain, value)) if type(value) in (list, tuple) else value


def get_model_config(name: str, **overrides: Any) -> ModelConfig:
  """Returns the config of a named architecture, with some fields replaced.

  Args:
    name: one of `list_models()`.
    **overrides: fields of `ModelConfig`, or of its mixer's config: `d_state=2`
      is short for the preset's mixer with this value, and `mixer="ss2d"` for
      that mixer with its authors' values.

  Raises:
    ValueError: the name, a field or a value is wrong, or the dtype is float64
      without JAX_ENABLE_X64.
  """
  if name not in list_models():
    raise UserError(
      f"no model is named {show(name)}: choose from {', '.join(list_models())}"
    )
  overrides = {key: _plain(value) for key, value in overrides.items()}
  preset = _PRESETS[name]
  mixer = overrides.pop("mixer", preset.mixer)
  if isinstance(mixer, str):
    mixer = MIXERS.get(mixer, mixer)
  if not isinstance(mixer, MixerConfig):
    raise UserError(
      f"mixer must be a MixerConfig or one of {', '.join(MIXERS)}, got"
      f" {show(mixer)}"
    )
  fields = [field.name for field in dataclasses.fields(preset)]
  mixer_fields = [
    field.name
    for field in dataclasses.fields(mixer)
    if field.name not in fields
  ]
  for key in overrides:
    if key not in (*fields, *mixer_fields):
      raise UserError(
        f"{key!r} is no field of a model"
        f"{suggestion(key, fields + mixer_fields)}"
      )
  mixer = dataclasses.replace(
    mixer, **{k: overrides.pop(k) for k in mixer_fields if k in overrides}
  )
  config = dataclasses.replace(preset, mixer=mixer, **overrides)
  if jax.dtypes.canonicalize_dtype(config.dtype) != config.dtype:
    raise UserError(
      "dtype must be float32 or narrower unless JAX_ENABLE_X64=1 is in the"
      " environment, got float64"
    )
  if "dtype" in overrides:
    config = dataclasses.replace(config, dtype=jnp.dtype(config.dtype))
  return config
