"""Token mixers, one file each, behind the interface in `base`."""

from spatial_mamba_jax.models.mixers.base import (
  LinearMixer,
  Mixer,
  MixerConfig,
  Place,
)
from spatial_mamba_jax.models.mixers.evss import EVSSConfig
from spatial_mamba_jax.models.mixers.linear_attention import (
  LinearAttentionConfig,
)
from spatial_mamba_jax.models.mixers.mamba import MambaConfig
from spatial_mamba_jax.models.mixers.mhs import MHSConfig
from spatial_mamba_jax.models.mixers.plain_mamba import PlainMambaConfig
from spatial_mamba_jax.models.mixers.ss2d import SS2DConfig
from spatial_mamba_jax.models.mixers.structure_aware import (
  States,
  StructureAwareConfig,
  StructureAwareSSM,
)
from spatial_mamba_jax.models.mixers.v2m import V2MConfig
from spatial_mamba_jax.models.mixers.vim import VimConfig

# {name: config with the defaults of the mixer's authors}.
MIXERS: dict[str, MixerConfig] = {
  mixer.name: mixer
  for mixer in (
    StructureAwareConfig(),
    MambaConfig(),
    VimConfig(),
    SS2DConfig(),
    LinearAttentionConfig(),
    PlainMambaConfig(),
    V2MConfig(),
    MHSConfig(),
    EVSSConfig(),
  )
}

__all__ = [
  "MIXERS",
  "EVSSConfig",
  "LinearAttentionConfig",
  "LinearMixer",
  "MHSConfig",
  "MambaConfig",
  "Mixer",
  "MixerConfig",
  "Place",
  "PlainMambaConfig",
  "SS2DConfig",
  "States",
  "StructureAwareConfig",
  "StructureAwareSSM",
  "V2MConfig",
  "VimConfig",
]
