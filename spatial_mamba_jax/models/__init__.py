"""Spatial-Mamba as Flax NNX modules."""

from spatial_mamba_jax.models.config import ModelConfig, list_models
from spatial_mamba_jax.models.spatial_mamba import (
  SpatialMamba,
  SpatialMambaBackbone,
  create_backbone,
  create_model,
)

__all__ = [
  "ModelConfig",
  "SpatialMamba",
  "SpatialMambaBackbone",
  "create_backbone",
  "create_model",
  "list_models",
]
