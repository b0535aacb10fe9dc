"""One training step and one evaluation step, pure functions over arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from spatial_mamba_kernels.typing import Array

from spatial_mamba_jax.models.pure import Arrays, PureModel, Weights
from spatial_mamba_jax.tasks.base import Task
from spatial_mamba_jax.training.optimizer import Optimizer
from spatial_mamba_jax.training.state import TrainState

Batch = dict[str, Array]


class _Gradients(NamedTuple):
  """Results of the forward and the backward pass over a batch.

  Attributes:
    params: gradients of the parameters that are trained.
    stats: new BatchNorm statistics.
    loss: mean over the batch.
    sums: see `Task`.
  """

  params: Arrays
  stats: Arrays
  loss: Array
  sums: Arrays


def make_train_step(
  task: Task,
  model: PureModel,
  optimizer: Optimizer,
  *,
  seed: int,
  ema_decay: float,
  accumulation_steps: int = 1,
  mesa_from: int | None = None,
) -> Callable[[TrainState, Batch], TrainState]:
  """Makes the step of a run: forward, backward, update, moving average.

  The seed and the step number determine every random draw.

  Args:
    task: the task to train.
    model: the task's network as a pure function.
    optimizer: the optimizer; `TrainState` holds its state.
    seed: seed of all random draws.
    ema_decay: decay rate of the moving average.
    accumulation_steps: microbatches per step.
    mesa_from: the step after which the moving average is the teacher (MESA,
      arXiv 2205.14083); None for no MESA.

  Returns:
    (state, batch) -> state, to be jitted with the state donated.
  """
  compute_gradients = _make_gradients(
    task, model, accumulation_steps, mesa_from
  )

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradients = compute_gradients(state, batch, key)
    trained = model.trained(state.weights.params)
    updates, opt_state, grad_norm = optimizer.update(
      gradients.params, state.opt_state, trained
    )
    trained = cast(Arrays, optax.apply_updates(trained, updates))
    weights = Weights({**state.weights.params, **trained}, gradients.stats)
    finite = jnp.isfinite(gradients.loss) & jnp.isfinite(grad_norm)
    window = {
      **gradients.sums,
      "loss": gradients.loss,
      "grad_norm": grad_norm,
      "images": next(iter(batch.values())).shape[0],
      "steps": 1,
    }
    return TrainState(
      step=state.step + 1,
      weights=weights,
      ema=_moving_average(state.ema, weights, ema_decay),
      opt_state=opt_state,
      window=jax.tree.map(_add, state.window, window),
      bad_step=jnp.where(
        (state.bad_step < 0) & ~finite, state.step + 1, state.bad_step
      ),
    )

  return train_step


def _add(total: Array, value: Any) -> Array:
  return total + jnp.asarray(value, total.dtype)


def _make_gradients(
  task: Task,
  model: PureModel,
  accumulation_steps: int,
  mesa_from: int | None,
) -> Callable[[TrainState, Batch, Array], _Gradients]:
  """Makes (state, batch, key) -> gradients; see `make_train_step`."""

  def loss(trained, weights, batch, teacher, key):
    params = {**weights.params, **trained}
    (value, sums), stats = model.apply(
      Weights(params, weights.stats),
      lambda network: task.loss(network, batch, key, teacher),
      train=True,
    )
    if set(sums) != set(task.sums):
      raise ValueError(f"the loss must sum up {task.sums}, not {tuple(sums)}")
    return value, (stats, sums)

  def compute_gradients(state, batch, key):
    def of_microbatch(stats, microbatch):
      batch, index = microbatch
      data_key, model_key = jax.random.split(jax.random.fold_in(key, index))
      prepared = task.prepare(batch, data_key)
      (value, (stats, sums)), grads = jax.value_and_grad(loss, has_aux=True)(
        model.trained(state.weights.params),
        Weights(state.weights.params, stats),
        prepared,
        _teacher(task, model, state, prepared, mesa_from),
        model_key,
      )
      return stats, (grads, value, sums)

    count = accumulation_steps
    if count == 1:
      stats, (grads, value, sums) = of_microbatch(
        state.weights.stats, (batch, 0)
      )
      return _Gradients(grads, stats, value, sums)
    stats, (grads, values, sums) = _accumulate(
      of_microbatch, state.weights.stats, _split_batch(batch, count), count
    )
    grads, value = jax.tree.map(lambda x: x / count, (grads, values))
    return _Gradients(grads, stats, value, sums)

  return compute_gradients


def _teacher(
  task: Task, model: PureModel, state: TrainState, batch: Any, start: int | None
) -> Any:
  """The moving average's predictions; zeros before MESA starts."""
  if start is None:
    return None

  def predict():
    return model.apply(
      state.ema, lambda network: task.teach(network, batch), train=False
    )[0]

  def zeros():
    shapes = jax.eval_shape(predict)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  return jax.lax.cond(state.step >= start, predict, zeros)


def _split_batch(batch: Batch, count: int) -> Batch:
  """[B, ...] to [count, B / count, ...]; images stay on their devices."""
  return {
    name: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    for name, x in batch.items()
  }


def _accumulate(
  function: Callable[..., Any], stats: Arrays, microbatches: Batch, count: int
) -> tuple[Arrays, Any]:
  """Sums a function's results over microbatches; each passes its statistics on.

  Args:
    function: (statistics, (microbatch, index)) -> (statistics, results).
    stats: the statistics before the first microbatch.
    microbatches: [count, B / count, ...].
    count: how many there are.
  """

  def step(carry, x):
    stats, sums = carry
    stats, out = function(stats, x)
    return (stats, jax.tree.map(jnp.add, sums, out)), None

  inputs = (microbatches, jnp.arange(count))
  first = jax.tree.map(lambda x: x[0], inputs)
  _, shapes = jax.eval_shape(function, stats, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (stats, sums), _ = jax.lax.scan(step, (stats, zeros), inputs)
  return stats, sums


def _moving_average(ema: Weights, weights: Weights, decay: float) -> Weights:
  """Averages floats; copies counts."""

  def average(old, new):
    if not decay or not jnp.issubdtype(old.dtype, jnp.floating):
      return new
    # In this form, a value that does not change stays the same to the last bit.
    return old + (1 - decay) * (new - old)

  return jax.tree.map(average, ema, weights)


def make_eval_step(
  task: Task, model: PureModel
) -> Callable[[Weights, Batch], Batch]:
  """Makes (weights, batch) -> predictions.

  The predictions are the columns of `task.predict`, with the batch's `index`
  and `mask` [B]. The index identifies records gathered from many processes.
  """

  def eval_step(weights, batch):
    columns, _ = model.apply(
      weights, lambda network: task.predict(network, batch), train=False
    )
    if taken := columns.keys() & {"index", "mask"}:
      raise ValueError(f"predictions must not be named {', '.join(taken)}")
    return {**columns, "index": batch["index"], "mask": batch["mask"]}

  return eval_step
