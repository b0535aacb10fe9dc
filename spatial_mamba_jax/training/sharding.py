"""Where arrays live: batches and the state on a mesh of devices."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spatial_mamba_jax.models import fsdp
from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.training.config import (
  MeshConfig,
  TrainConfig,
  TrainingError,
)
from spatial_mamba_jax.training.shard_vector import ShardVector, vector_specs
from spatial_mamba_jax.training.state import TrainState

# Axes of the mesh: groups of devices joined by a slower network, devices with
# parameters of their own, devices that share the parameters.
MESH_AXES = ("replica", "data", fsdp.AXIS)


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


def make_mesh(config: MeshConfig, devices: Sequence[Any] = ()) -> Mesh:
  """The devices of all processes along the axes `replica`, `data` and `fsdp`.

  Args:
    config: the sizes of the axes.
    devices: need not be there; empty for JAX's devices.

  Raises:
    TrainingError: the devices are not a multiple of `replica` * `fsdp`.
  """
  devices = list(devices) or jax.devices()
  data, left = divmod(len(devices), config.replica * config.fsdp)
  if left or not data:
    raise TrainingError(
      f"config.mesh asks for replica={config.replica} times"
      f" fsdp={config.fsdp} devices, which must divide the {len(devices)} there"
      " are"
    )
  return jax.make_mesh(
    (config.replica, data, config.fsdp),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis split over the devices."""
  return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def weights_sharding(shapes: Weights, mesh: Mesh) -> Weights:
  """Parameters sharded over `fsdp` by the rule; statistics on every device.

  Args:
    shapes: of the weights.
    mesh: the devices.
  """
  specs = ShardVector.on(mesh, shapes.params).specs
  return Weights(
    params={name: NamedSharding(mesh, spec) for name, spec in specs.items()},
    stats={name: replicated(mesh) for name in shapes.stats},
  )


def state_sharding(shapes: TrainState, mesh: Mesh) -> TrainState:
  """Weights as `weights_sharding`, moments with their parameters.

  Args:
    shapes: of the state.
    mesh: the devices.
  """
  on_all = jax.tree.map(lambda _: replicated(mesh), shapes)
  return dataclasses.replace(
    on_all,
    weights=weights_sharding(shapes.weights, mesh),
    ema=weights_sharding(shapes.ema, mesh),
    opt_state=jax.tree.map(
      lambda spec: NamedSharding(mesh, spec), vector_specs(shapes.opt_state)
    ),
  )


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
