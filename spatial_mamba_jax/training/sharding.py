"""Where arrays live: batches split over the devices, the state on each."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spatial_mamba_jax.training.config import TrainConfig, TrainingError


def initialize_distributed() -> None:
  """Joins the other processes of a run on several hosts.

  JAX finds them by itself on TPU pods, Slurm, Open MPI and Kubernetes.
  Elsewhere JAX_COORDINATOR_ADDRESS (process 0's host:port), JAX_NUM_PROCESSES
  and JAX_PROCESS_ID name them.

  Raises:
    TrainingError: neither names them.
  """
  count = os.environ.get("JAX_NUM_PROCESSES")
  index = os.environ.get("JAX_PROCESS_ID")
  try:
    # JAX reads the address from the environment, but not these two.
    jax.distributed.initialize(
      num_processes=int(count) if count else None,
      process_id=int(index) if index else None,
    )
  except ValueError as error:
    raise TrainingError(
      f"--distributed: no cluster that JAX knows was found ({error}); set"
      " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from error


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


def check_batch_sizes(config: TrainConfig, mesh: Mesh) -> None:
  """Raises a TrainingError unless the devices share batches evenly."""
  part = config.batch_size // config.accumulation_steps
  for field, size in (
    ("batch_size / accumulation_steps", part),
    ("evaluation_batch_size", config.evaluation_batch_size),
  ):
    if size % mesh.size:
      raise TrainingError(
        f"config.{field} = {size} must be a multiple of the {mesh.size} devices"
      )
