"""Run by test_sharding on eight CPU devices: training steps over meshes."""

import dataclasses
import re

import jax
import numpy as np

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.fsdp import shard_axis
from spatial_mamba_jax.models.pure import is_stacked
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import (
  MeshConfig,
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)
from spatial_mamba_jax.training.program import make_program
from spatial_mamba_jax.training.shard_vector import ShardVector
from spatial_mamba_jax.training.sharding import make_mesh, shard_batch

# {name: (devices, mesh)}.
MESHES = {
  "one device": (1, MeshConfig()),
  "data": (8, MeshConfig()),
  "fsdp": (8, MeshConfig(fsdp=8)),
  "all axes": (8, MeshConfig(replica=2, fsdp=2)),
}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all"


def program(mesh):
  devices, config = MESHES[mesh]
  return make_program(
    TrainConfig(
      task=ClassificationConfig(num_classes=10),
      model=ModelSection(
        dims=(64,), depths=(2,), drop_path_rate=0.2, dtype="float64"
      ),
      data=DataConfig(name="digits", image_size=16),
      optimizer=OptimizerConfig(warmup="1 step", clip_norm=0.5),
      mesh=config,
      batch_size=16,
      length="4 steps",
      mesa_weight=1.0,
      mesa_start=0.0,
      evaluation_batch_size=16,
    ),
    make_mesh(config, jax.devices()[:devices]),
    train_examples=64,
  )


def batch():
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (16, 16, 16, 3), np.uint8),
    "label": rng.integers(0, 10, 16, np.int32),
  }


def trained(program):
  """The state after three steps."""
  state = program.fresh_state()
  for _ in range(3):
    state = program.train_step(state, shard_batch(batch(), program.mesh))
    # Two programs at once could wait for each other's CPU threads.
    jax.block_until_ready(state)
  return state


def moments(program, state):
  """The optimizer's moments as one device has them."""
  vector = ShardVector.on(
    program.mesh, program.model.trained(program.model.shapes.params)
  )
  one = dataclasses.replace(vector, shards=1)
  adam = state.opt_state[0][1]
  return {
    name: vector.moved(jax.device_get(x), one)
    for name, x in (("mu", adam.mu), ("nu", adam.nu))
  }


def check_held(program, state):
  """A device holds what the rule says, and the optimizer gathers nothing."""
  shards = program.mesh.shape["fsdp"]
  names = {
    name: shard_axis(x.shape, shards, is_stacked=is_stacked(name))
    for name, x in program.model.shapes.params.items()
  }
  assert (set(names.values()) == {None}) == (shards == 1)
  for name, axis in names.items():
    for weights in (state.weights, state.ema):
      x = weights.params[name]
      share = x.addressable_shards[0].data.size
      assert share * (1 if axis is None else shards) == x.size, name
  adam = state.opt_state[0][1]
  assert adam.mu.addressable_shards[0].data.size * shards == adam.mu.size

  update = jax.jit(program.optimizer.update).lower(
    state.weights.params, state.opt_state, state.weights.params
  )
  found = re.findall(rf" ({COLLECTIVES})\(", update.compile().as_text())
  assert found == ["all-reduce"] * (shards > 1), found


def main():
  jax.config.update("jax_enable_x64", True)
  results = {}
  for mesh in MESHES:
    run = program(mesh)
    with jax.set_mesh(run.mesh):
      state = trained(run)
      check_held(run, state)
      results[mesh] = jax.device_get(
        (state.window, state.weights, state.ema, moments(run, state))
      )
  expected = results.pop("one device")
  for mesh, found in results.items():
    for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
      np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12, err_msg=mesh)
  print("equal")


main()
