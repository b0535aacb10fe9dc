"""The train step and the evaluation step of an experiment, with their shapes.

The loop, the evaluation, the benchmarks and ahead-of-time compilation build
their programs here. Building one computes nothing on a device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spatial_mamba_jax.models.pure import PureModel, Weights
from spatial_mamba_jax.tasks.base import Task
from spatial_mamba_jax.training.config import Schedule, TrainConfig
from spatial_mamba_jax.training.optimizer import (
  Optimizer,
  make_optimizer,
  make_schedule,
)
from spatial_mamba_jax.training.shard_vector import ShardVector
from spatial_mamba_jax.training.sharding import (
  batch_sharding,
  check_batch_sizes,
  replicated,
  shardings,
)
from spatial_mamba_jax.training.state import (
  TrainState,
  create_state,
  empty_window,
  state_shapes,
)
from spatial_mamba_jax.training.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """The evaluation step of an experiment.

  Attributes:
    config: the experiment.
    mesh: the devices.
    task: the task.
    model: the network as a pure function.
    eval_step: (weights, batch) -> columns, jitted; see `make_eval_step`.
  """

  config: TrainConfig
  mesh: Mesh
  task: Task
  model: PureModel
  eval_step: Callable[[Weights, dict[str, jax.Array]], dict[str, jax.Array]]

  @property
  def weight_shapes(self) -> Weights:
    """Shapes, types and shardings of the weights."""
    shapes = self.model.shapes
    return _placed(shapes, shardings(shapes, self.mesh))


@dataclasses.dataclass(frozen=True)
class Program(Evaluator):
  """The train step of an experiment, and its evaluation step.

  Attributes:
    times: the durations of the run, in steps.
    schedule: the learning rate by step.
    optimizer: the optimizer of the trained parameters.
    train_step: (state, batch) -> state, jitted; the old state is donated.
  """

  times: Schedule
  schedule: optax.Schedule
  optimizer: Optimizer
  train_step: jax.stages.Wrapped

  @property
  def state_shapes(self) -> TrainState:
    """Shapes, types and shardings of the training state."""
    shapes = state_shapes(self.model, self.optimizer, self.task.sums)
    return _placed(shapes, shardings(shapes, self.mesh))

  @property
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the global training batch."""
    sharding = batch_sharding(self.mesh)
    return {
      name: jax.ShapeDtypeStruct(
        (self.config.batch_size, *np.shape(x)),
        np.asarray(x).dtype,
        sharding=sharding,
      )
      for name, x in self.task.examples().blank(train=True).items()
    }

  def restored_state(
    self, restore: Callable[[TrainState], TrainState], *, shards: int
  ) -> TrainState:
    """The state of a checkpoint, whatever the mesh that saved it.

    Args:
      restore: (shapes, types and shardings) -> the arrays.
      shards: the size of `fsdp` in the mesh that saved it.
    """
    now = ShardVector.on(
      self.mesh, self.model.trained(self.model.shapes.params)
    )
    shapes = self.state_shapes
    if shards == now.shards:
      return restore(shapes)
    saved = dataclasses.replace(now, shards=shards)
    is_even = saved.shape.size % now.shards == 0

    def as_saved(x):
      sharding = x.sharding if is_even else replicated(self.mesh)
      shape = saved.shape.shape if x.ndim else x.shape
      return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    like = jax.tree.map(as_saved, shapes.opt_state)
    state = restore(dataclasses.replace(shapes, opt_state=like))
    move = jax.jit(
      lambda tree: jax.tree.map(
        lambda x: saved.moved(x, now) if x.ndim else x, tree
      ),
      out_shardings=jax.tree.map(lambda x: x.sharding, shapes.opt_state),
    )
    return dataclasses.replace(state, opt_state=move(state.opt_state))

  def fresh_state(self) -> TrainState:
    """Creates the state at step 0 on the mesh."""
    return create_state(
      self.model,
      self.optimizer,
      self.task.sums,
      self.config.seed,
      jax.tree.map(lambda x: x.sharding, self.state_shapes),
    )

  def empty_window(self) -> dict[str, jax.Array]:
    """Creates metric sums of zero on the mesh."""
    # Jitted, because `device_put` cannot reach devices of other processes.
    create = jax.jit(
      lambda: empty_window(self.task.sums), out_shardings=replicated(self.mesh)
    )
    return create()


def make_evaluator(config: TrainConfig, mesh: Mesh) -> Evaluator:
  """Builds the evaluation step of an experiment.

  Raises:
    UserError: a value of the config does not fit the mesh.
  """
  check_batch_sizes(config, mesh)
  task = config.create_task()
  model = PureModel(task.network, linear_probe=config.linear_probe)
  eval_step = jax.jit(
    make_eval_step(task, model), out_shardings=replicated(mesh)
  )
  return Evaluator(config, mesh, task, model, eval_step)


def make_program(
  config: TrainConfig, mesh: Mesh, *, train_examples: int
) -> Program:
  """Builds the train step and the evaluation step of an experiment.

  Args:
    config: the experiment.
    mesh: the devices; may be abstract, for ahead-of-time compilation.
    train_examples: the number of records in the training split.

  Raises:
    UserError: a value of the config does not fit the mesh or the data.
  """
  evaluator = make_evaluator(config, mesh)
  task, model = evaluator.task, evaluator.model
  times = config.count_steps(train_examples)
  schedule = make_schedule(
    config.optimizer,
    batch_size=config.batch_size,
    warmup_steps=times.warmup,
    steps=times.steps,
  )
  optimizer = make_optimizer(config.optimizer, schedule, model, mesh)
  step = make_train_step(
    task,
    model,
    optimizer,
    seed=config.seed,
    ema_decay=config.ema_decay,
    accumulation_steps=config.accumulation_steps,
    mesa_from=times.mesa_from,
  )
  shapes = state_shapes(model, optimizer, task.sums)
  train_step = jax.jit(
    step, donate_argnums=0, out_shardings=shardings(shapes, mesh)
  )
  evaluator_fields = {
    field.name: getattr(evaluator, field.name)
    for field in dataclasses.fields(Evaluator)
  }
  return Program(
    **evaluator_fields,
    times=times,
    schedule=schedule,
    optimizer=optimizer,
    train_step=train_step,
  )


def _placed(shapes: Any, sharding: Any) -> Any:
  """The same shapes with shardings."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    shapes,
    sharding,
  )


def copied(weights: Weights) -> Weights:
  """The same weights in memory of their own."""
  copy = jax.jit(
    lambda tree: jax.tree.map(jnp.copy, tree),
    out_shardings=jax.tree.map(lambda x: x.sharding, weights),
  )
  return copy(weights)
