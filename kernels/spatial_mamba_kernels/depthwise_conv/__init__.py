"""Depthwise convolution, alone or fused with its neighbours."""

from spatial_mamba_kernels.depthwise_conv.api import (
  causal_depthwise_conv as causal_depthwise_conv,
)
from spatial_mamba_kernels.depthwise_conv.api import (
  depthwise_conv as depthwise_conv,
)
from spatial_mamba_kernels.depthwise_conv.api import (
  relu_depthwise_conv as relu_depthwise_conv,
)
from spatial_mamba_kernels.depthwise_conv.api import (
  residual_depthwise_conv as residual_depthwise_conv,
)
from spatial_mamba_kernels.depthwise_conv.api import (
  silu_depthwise_conv as silu_depthwise_conv,
)
