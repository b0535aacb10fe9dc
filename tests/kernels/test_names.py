"""Programs and profiles tell operators apart by their names."""

import importlib

from spatial_mamba_kernels.dispatch import Operator
from spatial_mamba_kernels.depthwise_conv import api as depthwise_conv
from spatial_mamba_kernels.state_fusion import api as state_fusion

FOLDERS = (
  *("depthwise_conv", "layer_norm", "mlp", "selective_scan"),
  *("state_fusion", "structure_aware_ssm"),
)


def test_no_two_operators_have_one_name():
  modules = [
    importlib.import_module(f"spatial_mamba_kernels.{folder}.api")
    for folder in FOLDERS
  ]
  operators = [
    value
    for module in modules
    for value in vars(module).values()
    if isinstance(value, Operator)
  ]
  # Those that are made for a stride or for dilations.
  operators += [depthwise_conv.operator(1)]
  operators.append(state_fusion._operator((1, 3, 5)))
  names = [operator.name for operator in operators]
  assert len(names) == 10
  assert len(set(names)) == len(names)
