"""Operators on images whose rows a mesh axis splits over devices."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk

ROOT = pathlib.Path(__file__).parents[2]


def test_eight_devices_compute_what_one_does():
  """Values and gradients of three operators and a network, to 1e-12."""
  script = pathlib.Path(__file__).with_name("split_rows.py")
  flags = os.environ.get("XLA_FLAGS", "")
  process = subprocess.run(
    [sys.executable, script],
    env={
      **os.environ,
      "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    },
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
  ("height", "message"),
  [
    (4, r"state_fusion: .* 'rows' needs a multiple of 2 rows, 10 or more, n"),
    (11, r"state_fusion: .* 'rows' needs a multiple of 2 rows, 10 .* not 11$"),
  ],
)
def test_rows_that_cannot_be_split_are_refused(height, message):
  mesh = jax.sharding.AbstractMesh(
    (2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  h = np.ones((1, height, 2, 1), np.float32)
  weights = np.ones((3, 3, 3, 1), np.float32), np.ones(3, np.float32)
  tokens = np.ones((1, 3, 1), np.float32)
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(ValueError, match=message):
      smk.state_fusion(h, *weights)
    with pytest.raises(ValueError, match="needs a multiple of 2 tokens, 2 or"):
      smk.selective_scan(tokens, tokens, -jnp.ones((1, 1)), tokens)
