"""Sharding of batches and of the training state over a mesh of devices."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spatial_mamba_jax.models import fsdp
from spatial_mamba_jax.training.config import (
  MeshConfig,
  TrainConfig,
  TrainingError,
)
from spatial_mamba_jax.training.shard_vector import sharded_axis, vector_spec

# Axes of the mesh, slowest network first. All three shard the batch; `fsdp`
# also shards the parameters.
MESH_AXES = ("replica", "data", fsdp.AXIS)


def initialize_distributed() -> None:
  """Joins the other processes of a run on several hosts.

  JAX detects TPU pods, Slurm, Open MPI and Kubernetes. Elsewhere the
  environment must define JAX_COORDINATOR_ADDRESS (process 0's host:port),
  JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Raises:
    TrainingError: JAX detects no cluster, and the variables are not set.
  """
  count = os.environ.get("JAX_NUM_PROCESSES")
  index = os.environ.get("JAX_PROCESS_ID")
  try:
    # JAX reads only the address from the environment.
    jax.distributed.initialize(
      num_processes=int(count) if count else None,
      process_id=int(index) if index else None,
    )
  except ValueError as error:
    raise TrainingError(
      f"--distributed: no cluster that JAX knows was found ({error}); set"
      " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from error


def make_mesh(config: MeshConfig, devices: Sequence[Any] = ()) -> Mesh:
  """Makes a mesh of all devices, with the axes `replica`, `data` and `fsdp`.

  Args:
    config: the sizes of `replica` and `fsdp`; `data` takes the other devices.
      The slices of TPUs, which a slower network joins, lie along `replica`.
    devices: the devices, which may be those of an ahead-of-time topology; empty
      for JAX's devices.

  Raises:
    TrainingError: the devices are not a multiple of `replica` * `fsdp`, or
      `replica` is not a multiple of the slices.
  """
  devices = list(devices) or jax.devices()
  data, left = divmod(len(devices), config.replica * config.fsdp)
  if left or not data:
    raise TrainingError(
      f"config.mesh.replica={config.replica} times"
      f" config.mesh.fsdp={config.fsdp} must divide the number of devices,"
      f" {len(devices)}"
    )
  slices = _slices(devices)
  replicas, left = divmod(config.replica, len(slices))
  if left:
    raise TrainingError(
      f"config.mesh.replica={config.replica} must be a multiple of the"
      f" {len(slices)} slices, which a slower network joins"
    )
  axis_types = (AxisType.Auto,) * len(MESH_AXES)
  # JAX arranges the devices of one slice by its links, but not several slices.
  meshes = [
    jax.make_mesh(
      (replicas, data, config.fsdp), MESH_AXES, axis_types, devices=of_slice
    )
    for of_slice in slices
  ]
  arranged = np.concatenate([mesh.devices for mesh in meshes])
  return Mesh(arranged, MESH_AXES, axis_types)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
  """The devices of each slice of TPUs; of other devices one list."""
  slices = {}
  for device in devices:
    index = getattr(device, "slice_index", None)
    index = index if device.platform == "tpu" else None
    slices.setdefault(index, []).append(device)
  return list(slices.values())


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def shardings(shapes: Any, mesh: Mesh) -> Any:
  """Returns the shardings of `Weights` or of a `TrainState`.

  Parameters are sharded by `fsdp.shard_axis`, the optimizer's vectors by
  `ShardVector`. All else is replicated.

  Args:
    shapes: shapes of the arrays.
    mesh: the devices.
  """

  def sharding(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.startswith("opt_state/"):
      spec = vector_spec(x)
    elif "params/" in name:
      axis = sharded_axis(name.rpartition("/")[2], x.shape, shards)
      spec = fsdp.axis_spec(axis)
    else:
      spec = PartitionSpec()
    return NamedSharding(mesh, spec)

  shards = fsdp.shard_count(mesh)
  return jax.tree_util.tree_map_with_path(sharding, shapes)


def shard_batch(
  batch: dict[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes a global batch; each process passes its `local_rows`, in order."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
  """Returns the rows of a global batch that this process's devices hold."""
  pieces = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  return sorted(
    row
    for index in pieces.values()
    if index is not None
    for row in range(*index[0].indices(batch_size))
  )


def check_batch_sizes(config: TrainConfig, mesh: Mesh) -> None:
  """Raises a TrainingError unless the devices divide the batch sizes."""
  microbatch = config.batch_size // config.accumulation_steps
  for field, size in (
    ("batch_size / accumulation_steps", microbatch),
    ("evaluation_batch_size", config.evaluation_batch_size),
  ):
    if size % mesh.size:
      raise TrainingError(
        f"config.{field} = {size} must be a multiple of the {mesh.size} devices"
      )
