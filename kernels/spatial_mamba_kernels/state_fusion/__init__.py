"""Structure-aware state fusion: dilated depthwise stencils over the states."""

from spatial_mamba_kernels.state_fusion.api import state_fusion as state_fusion
from spatial_mamba_kernels.state_fusion.xla import fuse as fuse
