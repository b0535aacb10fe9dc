"""Token mixers, one file each, behind the interface in `base`."""

from spatial_mamba_jax.models.mixers.base import Mixer, MixerConfig, Place
from spatial_mamba_jax.models.mixers.structure_aware import (
  States,
  StructureAwareConfig,
  StructureAwareSSM,
)

__all__ = [
  "Mixer",
  "MixerConfig",
  "Place",
  "States",
  "StructureAwareConfig",
  "StructureAwareSSM",
]
