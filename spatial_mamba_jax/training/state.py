"""All that a training step changes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.models.pure import PureModel, Weights
from spatial_mamba_jax.training.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
  """The state between two steps; a checkpoint holds all of it.

  Attributes:
    step: steps taken.
    weights: the model's.
    ema: their moving average.
    opt_state: the optimizer's.
    window: sums of metrics since the last logged line; they belong here so
      that a resumed run logs what the uninterrupted one would have.
    bad_step: the first step whose loss or gradient was not finite, else -1.
  """

  step: Int[Any, ""]
  weights: Weights
  ema: Weights
  opt_state: optax.OptState
  window: dict[str, Float[Any, ""]]
  bad_step: Int[Any, ""]


# Compiler options, by platform. Drawing numbers is little work in a large
# program, that takes longer to optimise than to run.
_QUICKLY = {
  "cpu": {"xla_backend_optimization_level": 0},
  "tpu": {"optimization_level": 9},  # XLA's name of it is O0.
}


def create_state(
  model: PureModel,
  optimizer: Optimizer,
  sums: Sequence[str],
  seed: int,
  sharding: Any,
) -> TrainState:
  """A fresh state, made where it is to live."""
  return jax.jit(
    lambda: initial_state(model.init(jax.random.key(seed)), optimizer, sums),
    out_shardings=sharding,
    compiler_options=_QUICKLY.get(jax.default_backend()),
  )()


def state_shapes(
  model: PureModel,
  optimizer: Optimizer,
  sums: Sequence[str],
) -> TrainState:
  """The shapes and types of a state."""
  return jax.eval_shape(
    partial(initial_state, optimizer=optimizer, sums=sums), model.shapes
  )


def initial_state(
  weights: Weights,
  optimizer: Optimizer,
  sums: Sequence[str],
) -> TrainState:
  """The state at step 0 of a run that starts from `weights`.

  Args:
    weights: of the network.
    optimizer: whose state is begun.
    sums: see `Task`.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    weights=weights,
    ema=jax.tree.map(jnp.copy, weights),
    opt_state=optimizer.init(weights.params),
    window=empty_window(sums),
    bad_step=jnp.full((), -1, jnp.int32),
  )


def empty_window(sums: Sequence[str]) -> dict[str, Float[Array, ""]]:
  """Sums of nothing: the task's, loss, gradient norm, images and steps."""
  names = (*sums, "loss", "grad_norm", "images", "steps")
  if len(set(names)) < len(names):
    raise ValueError(f"a task's sums must have names of their own, not {sums}")
  return {name: jnp.zeros((), jnp.result_type(float)) for name in names}
