"""Depthwise 3x3 convolution, alone or behind a bias and ReLU."""

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
