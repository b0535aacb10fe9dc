"""Where the state and batches live on a mesh."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.sharding import AxisType

from spatial_mamba_jax.models.fsdp import axis_spec, is_sharded, shard_axis
from spatial_mamba_jax.training.config import MeshConfig, TrainingError
from spatial_mamba_jax.training.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
  ("shape", "stacked", "shards", "axis"),
  [
    ((64, 128), False, 8, 1),
    ((128, 128), False, 8, 0),
    ((100, 64), False, 8, 1),  # 8 does not divide 100.
    ((100, 100), False, 8, None),
    ((64, 63), False, 8, None),  # Fewer than 4,096 elements.
    ((4096,), False, 8, 0),
    ((64, 64, 64), True, 8, 1),  # Blocks stay together.
    ((64, 63, 64), True, 8, None),  # One block's part decides.
    ((3, 3, 3, 256), False, 4, 3),
    ((64, 128), False, 1, None),
  ],
)
def test_the_largest_axis_is_sharded(shape, stacked, shards, axis):
  assert shard_axis(shape, shards, is_stacked=stacked) == axis


def test_spec_of_an_axis():
  assert axis_spec(None) == jax.sharding.PartitionSpec()
  assert axis_spec(1) == jax.sharding.PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
  ("kind", "is_gathered"),
  [(AxisType.Auto, True), (AxisType.Explicit, False), (AxisType.Manual, False)],
)
def test_only_the_partitioner_gathers(kind, is_gathered):
  """An axis named `fsdp` of another kind is not for `gather`."""
  mesh = jax.sharding.AbstractMesh((2,), ("fsdp",), axis_types=(kind,))
  with jax.sharding.use_abstract_mesh(mesh):
    assert is_sharded() == is_gathered


def test_a_mesh_that_does_not_divide_the_devices():
  count = len(jax.devices())
  with pytest.raises(TrainingError) as caught:
    make_mesh(MeshConfig(replica=3, fsdp=2 * count))
  assert str(caught.value) == (
    f"config.mesh.replica=3 times config.mesh.fsdp={2 * count} must divide the"
    f" number of devices, {count}"
  )


@pytest.mark.soak
def test_every_mesh_trains_and_restores_as_one_device(tmp_path):
  script = pathlib.Path(__file__).with_name("sharded_steps.py")
  result = subprocess.run(
    (sys.executable, script, tmp_path),
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
      + " --xla_force_host_platform_device_count=8",
    },
    capture_output=True,
    check=False,
    text=True,
  )
  assert result.stdout == "equal\n", result.stderr
