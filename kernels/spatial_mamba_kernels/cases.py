"""The cases of all operators; the library does not import this module."""

from spatial_mamba_kernels.case import Case
from spatial_mamba_kernels.depthwise_conv.cases import CASES as DEPTHWISE_CONV
from spatial_mamba_kernels.layer_norm.cases import CASES as LAYER_NORM
from spatial_mamba_kernels.mlp.cases import CASES as MLP
from spatial_mamba_kernels.selective_scan.cases import CASES as SELECTIVE_SCAN
from spatial_mamba_kernels.selective_ssm.cases import CASES as SELECTIVE_SSM
from spatial_mamba_kernels.state_fusion.cases import CASES as STATE_FUSION
from spatial_mamba_kernels.structure_aware_ssm.cases import CASES as SSM

CASES: tuple[Case, ...] = (
  *SELECTIVE_SCAN,
  *SELECTIVE_SSM,
  *STATE_FUSION,
  *SSM,
  *DEPTHWISE_CONV,
  *MLP,
  *LAYER_NORM,
)


def by_name(name: str) -> Case:
  """Returns the case of an operator's name."""
  (case,) = (case for case in CASES if case.name == name)
  return case
