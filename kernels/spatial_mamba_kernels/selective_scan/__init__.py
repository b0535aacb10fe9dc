"""The selective scan: input-dependent decay of a diagonal state."""

from spatial_mamba_kernels.selective_scan.api import (
  selective_scan as selective_scan,
)
from spatial_mamba_kernels.selective_scan.xla import states as states
