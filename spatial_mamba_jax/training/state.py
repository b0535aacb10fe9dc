"""The state that a training step changes."""

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
    step: the number of steps taken.
    weights: the network's weights.
    ema: the moving average of the weights.
    opt_state: the optimizer's state.
    window: sums of metrics since the last logged line. A checkpoint holds them,
      so that a resumed run logs the same values as an uninterrupted one.
    bad_step: the first step whose loss or gradient was not finite; -1 if none.
  """

  step: Int[Any, ""]
  weights: Weights
  ema: Weights
  opt_state: optax.OptState
  window: dict[str, Float[Any, ""]]
  bad_step: Int[Any, ""]


# {platform: compiler options} of the program that draws the weights. It runs
# once, and optimising it would take longer than running it.
_COMPILER_OPTIONS = {
  "cpu": {"xla_backend_optimization_level": 0},
  "tpu": {"optimization_level": 9},  # XLA's number of O0.
}


def create_state(
  model: PureModel,
  optimizer: Optimizer,
  sums: Sequence[str],
  seed: int,
  sharding: Any,
) -> TrainState:
  """Creates the state at step 0 with these shardings."""
  return jax.jit(
    lambda: initial_state(model.init(jax.random.key(seed)), optimizer, sums),
    out_shardings=sharding,
    compiler_options=_COMPILER_OPTIONS.get(jax.default_backend()),
  )()


def state_shapes(
  model: PureModel,
  optimizer: Optimizer,
  sums: Sequence[str],
) -> TrainState:
  """Returns the shapes and types of a state."""
  return jax.eval_shape(
    partial(initial_state, optimizer=optimizer, sums=sums), model.shapes
  )


def initial_state(
  weights: Weights,
  optimizer: Optimizer,
  sums: Sequence[str],
) -> TrainState:
  """Returns the state at step 0 of a run that starts from `weights`.

  Args:
    weights: weights of the network.
    optimizer: the optimizer, which creates its own state.
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
  """Returns zero for each of the sums of a window."""
  names = (*sums, "loss", "grad_norm", "images", "steps")
  if len(set(names)) < len(names):
    raise ValueError(f"a task's sums must have names of their own, not {sums}")
  return {name: jnp.zeros((), jnp.result_type(float)) for name in names}
