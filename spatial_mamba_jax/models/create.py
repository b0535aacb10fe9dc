"""Creates models by name."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.spatial_mamba import (
  SpatialMamba,
  SpatialMambaBackbone,
)


def create_model(
  name: str, *, rngs: nnx.Rngs, **overrides: Any
) -> SpatialMamba:
  """Creates a classifier with the authors' initialisation, in eval mode.

      model = create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
      logits = model(images)

  Args:
    name: one of `list_models()`.
    rngs: random streams; `params` initialises the weights.
    **overrides: fields of `ModelConfig` to replace, e.g. num_classes=10.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  return SpatialMamba(get_model_config(name, **overrides), rngs=rngs)


def create_backbone(
  name: str,
  *,
  out_indices: Sequence[int] = (0, 1, 2, 3),
  rngs: nnx.Rngs,
  **overrides: Any,
) -> SpatialMambaBackbone:
  """Creates a backbone for dense tasks, in eval mode.

  Args:
    name: one of `list_models()`.
    out_indices: indices of the stages whose features are returned.
    rngs: random streams; `params` initialises the weights.
    **overrides: fields of `ModelConfig` to replace.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  config = get_model_config(name, **overrides)
  return SpatialMambaBackbone(config, out_indices=out_indices, rngs=rngs)
