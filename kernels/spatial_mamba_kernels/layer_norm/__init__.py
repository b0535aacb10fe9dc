"""Layer normalisation at the start of a residual branch, and with a gate."""

from spatial_mamba_kernels.layer_norm.api import (
  gated_layer_norm as gated_layer_norm,
)
from spatial_mamba_kernels.layer_norm.api import (
  residual_layer_norm as residual_layer_norm,
)
