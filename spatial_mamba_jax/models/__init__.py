"""Spatial-Mamba and VMamba as Flax NNX modules, with any token mixer."""

from spatial_mamba_jax.models.backbone import Backbone, Classifier
from spatial_mamba_jax.models.config import Family, ModelConfig
from spatial_mamba_jax.models.freezing import freeze
from spatial_mamba_jax.models.mixers import States, StructureAwareConfig
from spatial_mamba_jax.models.presets import list_models
from spatial_mamba_jax.models.segmentor import Segmentor, create_segmentor
from spatial_mamba_jax.models.spatial_mamba import (
  SpatialMamba,
  SpatialMambaBackbone,
)
from spatial_mamba_jax.models.states import block_states
from spatial_mamba_jax.models.summary import Summary, summary
from spatial_mamba_jax.models.vmamba import VMamba, VMambaBackbone

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
  "Summary",
  "VMamba",
  "VMambaBackbone",
  "block_states",
  "create_segmentor",
  "freeze",
  "list_models",
  "summary",
]
