"""Spatial-Mamba as Flax NNX modules."""

from spatial_mamba_jax.models.config import ModelConfig, list_models
from spatial_mamba_jax.models.spatial_mamba import (
  SpatialMamba,
  SpatialMambaBackbone,
  create_backbone,
  create_model,
)
from spatial_mamba_jax.models.ssm import States
from spatial_mamba_jax.models.states import block_states

__all__ = [
  "ModelConfig",
  "SpatialMamba",
  "SpatialMambaBackbone",
  "States",
  "block_states",
  "create_backbone",
  "create_model",
  "list_models",
]
