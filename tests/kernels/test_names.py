"""Programs and profiles tell operators apart by their names."""

import importlib
import pathlib

import pytest
import spatial_mamba_kernels
from spatial_mamba_kernels.cases import CASES
from spatial_mamba_kernels.dispatch import Operator

FOLDERS = [
  path.parent.name
  for path in pathlib.Path(spatial_mamba_kernels.__file__).parent.glob(
    "*/api.py"
  )
]


def test_no_two_operators_have_one_name():
  names = [case.name for case in CASES]
  assert len(set(names)) == len(names)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_operator_has_its_case(folder):
  api = importlib.import_module(f"spatial_mamba_kernels.{folder}.api")
  made = [x for x in vars(api).values() if isinstance(x, Operator)]
  names = {x.name for x in made}
  if callable(getattr(api, "operator", None)) and not made:
    names.add(folder)  # Made for dilations.
  assert names
  assert names <= {case.name for case in CASES}
