"""Scan, fusion and observation in one operator."""

from spatial_mamba_kernels.structure_aware_ssm.api import (
  structure_aware_ssm as structure_aware_ssm,
)
