"""The selective SSM: a scan whose states are read out at once."""

from spatial_mamba_kernels.selective_ssm.api import (
  selective_ssm as selective_ssm,
)
