"""Depthwise 3x3 convolution."""

from spatial_mamba_kernels.depthwise_conv.api import (
  depthwise_conv as depthwise_conv,
)
