"""Spatial-Mamba and other visual state-space models in JAX.

    import spatial_mamba_jax as smj
    from flax import nnx

    model = smj.create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
    logits = model(images)

`images` are normalised, [B, H, W, 3]; `logits` are [B, 1000].
"""

from spatial_mamba_jax import convert
from spatial_mamba_jax.convert.pretrained import (
  from_pretrained,
  save_pretrained,
)
from spatial_mamba_jax.export import export_model, export_onnx
from spatial_mamba_jax.models import (
  Backbone,
  Classifier,
  Family,
  ModelConfig,
  Segmentor,
  SpatialMamba,
  SpatialMambaBackbone,
  States,
  StructureAwareConfig,
  VMamba,
  VMambaBackbone,
  block_states,
  create_backbone,
  create_model,
  create_segmentor,
  list_models,
)

__all__ = [
  "Backbone",
  "Classifier",
  "Family",
  "ModelConfig",
  "Segmentor",
  "SpatialMamba",
  "SpatialMambaBackbone",
  "States",
  "StructureAwareConfig",
  "VMamba",
  "VMambaBackbone",
  "block_states",
  "convert",
  "create_backbone",
  "create_model",
  "create_segmentor",
  "export_model",
  "export_onnx",
  "from_pretrained",
  "list_models",
  "save_pretrained",
]
