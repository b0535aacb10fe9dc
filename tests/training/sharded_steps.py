"""Run by test_sharding on eight CPU devices: training steps over meshes."""

import dataclasses
import pathlib
import re
import sys
from functools import partial

import jax
import numpy as np

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.fsdp import shard_axis
from spatial_mamba_jax.models.pure import is_stacked
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import (
  MeshConfig,
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)
from spatial_mamba_jax.training.experiment import saved_shards, to_dict
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
# (mesh that saves, mesh that restores).
RESTORED = (
  ("one device", "one device"),
  ("fsdp", "fsdp"),
  ("fsdp", "one device"),
  ("one device", "fsdp"),
  ("fsdp", "all axes"),
)
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all"


def program(mesh):
  devices, config = MESHES[mesh]
  return make_program(
    TrainConfig(
      task=ClassificationConfig(num_classes=10, erasing_probability=1.0),
      model=ModelSection(
        dims=(64,), depths=(2,), drop_path_rate=0.2, dtype="float64"
      ),
      data=DataConfig(name="digits", image_size=16),
      optimizer=OptimizerConfig(warmup="1 step", clip_norm=0.5),
      mesh=config,
      batch_size=16,
      accumulation_steps=2,
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


def compiled(program):
  """Returns the training step; data parallelism moves no images or weights."""
  step = program.train_step.lower(program.state_shapes, program.batch_shapes)
  step = step.compile()
  found = set(re.findall(rf" ({COLLECTIVES})\(", step.as_text()))
  shards = program.mesh.shape["fsdp"]
  assert ("all-gather" in found) == (shards > 1), found
  assert ("all-reduce" in found) == (program.mesh.size > 1), found
  assert "all-to-all" not in found
  return step


def trained(program, step, state, steps):
  """Returns the state after more steps."""
  for _ in range(steps):
    state = step(state, shard_batch(batch(), program.mesh))
    # Two programs at once could wait for each other's CPU threads.
    jax.block_until_ready(state)
  return state


def results(program, state):
  """Returns what must be equal on every mesh, the moments as of one device."""
  vector = ShardVector.on(
    program.mesh, program.model.trained(program.model.shapes.params)
  )
  one = dataclasses.replace(vector, shards=1)
  adam = state.opt_state[0][1]
  moments = [vector.moved(jax.device_get(x), one) for x in (adam.mu, adam.nu)]
  return jax.device_get((state.window, state.weights, state.ema, moments))


def assert_equal(found, expected, what):
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=what)


def check_held(program, state):
  """Each device holds its shards, and the optimizer gathers nothing."""
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
  directory = pathlib.Path(sys.argv[1])
  programs = {mesh: program(mesh) for mesh in MESHES}
  steps, found = {}, {}
  for mesh, run in programs.items():
    with jax.set_mesh(run.mesh), Checkpoints(directory / mesh) as checkpoints:
      steps[mesh] = compiled(run)
      state = trained(run, steps[mesh], run.fresh_state(), 3)
      check_held(run, state)
      found[mesh] = results(run, state)
      checkpoints.save(state, to_dict(run.config))
  for mesh in MESHES:
    assert_equal(found[mesh], found["one device"], mesh)

  # A checkpoint of one mesh, restored on another.
  after = {}
  for saved, mesh in RESTORED:
    run = programs[mesh]
    with jax.set_mesh(run.mesh), Checkpoints(directory / saved) as checkpoints:
      state = run.restored_state(
        partial(checkpoints.restore_state, 3),
        shards=saved_shards(checkpoints.experiment(3)),
      )
      assert_equal(results(run, state), found[saved], f"{saved} to {mesh}")
      after[saved, mesh] = results(run, trained(run, steps[mesh], state, 1))
  for meshes, result in after.items():
    assert_equal(result, after[RESTORED[0]], " to ".join(meshes))
  print("equal")


main()
