"""Creates models by name."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from spatial_mamba_jax.models.backbone import Backbone, Classifier
from spatial_mamba_jax.models.presets import get_model_config


def create_model(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Classifier:
  """Creates a classifier with the authors' initialisation, in eval mode.

      model = create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
      logits = model(images)

  Args:
    name: one of `list_models()`.
    rngs: random streams; `params` initialises the weights.
    **overrides: fields of `ModelConfig` to replace, e.g. num_classes=10.

  Returns:
    A classifier of the name's family, e.g. a `SpatialMamba`.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  config = get_model_config(name, **overrides)
  return config.family.classifier(config, rngs=rngs)


def create_backbone(
  name: str,
  *,
  out_indices: Sequence[int] = (0, 1, 2, 3),
  rngs: nnx.Rngs,
  **overrides: Any,
) -> Backbone:
  """Creates a backbone for dense tasks, in eval mode.

  Args:
    name: one of `list_models()`.
    out_indices: indices of the stages whose features are returned.
    rngs: random streams; `params` initialises the weights.
    **overrides: fields of `ModelConfig` to replace.

  Returns:
    A backbone of the name's family, e.g. a `SpatialMambaBackbone`.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  config = get_model_config(name, **overrides)
  return config.family.backbone(config, out_indices=out_indices, rngs=rngs)
