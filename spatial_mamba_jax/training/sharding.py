"""Where arrays live: batches split over the devices, the state on each."""

import multiprocessing
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def initialize_distributed() -> None:
  """Joins the other processes of a multi-host run, where there are any.

  They are named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or, with the first alone, found out by JAX on a cluster it
  knows. Data workers import the main script and must not join.
  """
  in_worker = multiprocessing.parent_process() is not None
  if in_worker or "JAX_COORDINATOR_ADDRESS" not in os.environ:
    return
  jax.distributed.initialize()


def make_mesh() -> Mesh:
  """All devices of all processes along one axis, `data`."""
  devices = jax.device_count()
  return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(
  batch: dict[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes one global batch of the parts that the processes hold."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in batch.items()
  }
