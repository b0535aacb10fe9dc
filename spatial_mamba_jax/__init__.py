"""Spatial-Mamba and other visual state-space models in JAX.

    import spatial_mamba_jax as smj
    from flax import nnx

    model = smj.create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
    logits = model(images)

`images` are normalised, [B, H, W, 3]; `logits` are [B, 1000].
"""

import importlib.metadata

from spatial_mamba_jax import convert
from spatial_mamba_jax.convert.model_card import Provenance
from spatial_mamba_jax.convert.pretrained import (
  from_pretrained,
  save_pretrained,
)
from spatial_mamba_jax.create import create_backbone, create_model
from spatial_mamba_jax.export import export_model, export_onnx, quantize
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
  Summary,
  VMamba,
  VMambaBackbone,
  block_states,
  create_segmentor,
  freeze,
  list_models,
  summary,
)
from spatial_mamba_jax.preprocessing import Preprocessing
from spatial_mamba_jax.transform import Transform, create_transform

__all__ = [
  "Backbone",
  "Classifier",
  "Family",
  "ModelConfig",
  "Preprocessing",
  "Provenance",
  "Segmentor",
  "SpatialMamba",
  "SpatialMambaBackbone",
  "States",
  "StructureAwareConfig",
  "Summary",
  "Transform",
  "VMamba",
  "VMambaBackbone",
  "block_states",
  "convert",
  "create_backbone",
  "create_model",
  "create_segmentor",
  "create_transform",
  "export_model",
  "export_onnx",
  "freeze",
  "from_pretrained",
  "list_models",
  "quantize",
  "save_pretrained",
  "summary",
]

__version__ = importlib.metadata.version("spatial-mamba-jax")
