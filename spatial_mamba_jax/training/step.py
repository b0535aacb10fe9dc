"""One training step and one evaluation step, pure functions over arrays."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from spatial_mamba_kernels.typing import Array

from spatial_mamba_jax.models.pure import Arrays, PureModel, Weights
from spatial_mamba_jax.tasks.base import Task
from spatial_mamba_jax.training.optimizer import Optimizer
from spatial_mamba_jax.training.state import TrainState


def make_train_step(
  task: Task,
  model: PureModel,
  optimizer: Optimizer,
  *,
  seed: int,
  ema_decay: float,
  accumulation_steps: int = 1,
  mesa_from: int | None = None,
) -> Callable[[TrainState, dict[str, Array]], TrainState]:
  """The step of a run: forward, backward, update, moving average.

  All that is random in it follows from the seed and the number of the step.

  Args:
    task: what is trained for.
    model: its network as a pure function.
    optimizer: whose state is in the `TrainState`.
    seed: of all that is random.
    ema_decay: of the moving average.
    accumulation_steps: parts that a batch is computed in.
    mesa_from: the step after which the moving average teaches (MESA, arXiv
      2205.14083); None for never.

  Returns:
    (state, batch) -> state, to be jitted with the state donated.
  """

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

  def teach(state, batch):
    """The moving average's predictions; zeros before MESA begins."""
    if mesa_from is None:
      return None

    def predict():
      return model.apply(
        state.ema, lambda network: task.teach(network, batch), train=False
      )[0]

    def silent():
      shapes = jax.eval_shape(predict)
      return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(state.step >= mesa_from, predict, silent)

  def gradients(state, batch, key):
    def part(stats, part_of_batch):
      batch, index = part_of_batch
      data_key, model_key = jax.random.split(jax.random.fold_in(key, index))
      prepared = task.prepare(batch, data_key)
      (value, (stats, sums)), grads = jax.value_and_grad(loss, has_aux=True)(
        model.trained(state.weights.params),
        Weights(state.weights.params, stats),
        prepared,
        teach(state, prepared),
        model_key,
      )
      return stats, (grads, value, sums)

    count = accumulation_steps
    if count == 1:
      stats, out = part(state.weights.stats, (batch, 0))
      return stats, *out
    stats, (grads, values, sums) = _accumulate(
      part, state.weights.stats, _split_batch(batch, count), count
    )
    mean = jax.tree.map(lambda x: x / count, (grads, values))
    return stats, *mean, sums

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    stats, grads, value, sums = gradients(state, batch, key)
    trained = model.trained(state.weights.params)
    updates, opt_state, grad_norm = optimizer.update(
      grads, state.opt_state, trained
    )
    trained = cast(Arrays, optax.apply_updates(trained, updates))
    weights = Weights({**state.weights.params, **trained}, stats)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    window = {
      **sums,
      "loss": value,
      "grad_norm": grad_norm,
      "images": next(iter(batch.values())).shape[0],
      "steps": 1,
    }
    return TrainState(
      step=state.step + 1,
      weights=weights,
      ema=_moving_average(state.ema, weights, ema_decay),
      opt_state=opt_state,
      window=jax.tree.map(
        lambda old, new: old + jnp.asarray(new, old.dtype), state.window, window
      ),
      bad_step=jnp.where(
        (state.bad_step < 0) & ~finite, state.step + 1, state.bad_step
      ),
    )

  return train_step


def _split_batch(batch: dict[str, Array], count: int) -> dict[str, Array]:
  """[B, ...] to [count, B / count, ...], each device keeping its images."""
  return {
    name: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)
    for name, x in batch.items()
  }


def _accumulate(part, stats, parts, count):
  """Sums what `part` returns, its statistics passed from part to part."""

  def step(carry, x):
    stats, sums = carry
    stats, out = part(stats, x)
    return (stats, jax.tree.map(jnp.add, sums, out)), None

  parts = (parts, jnp.arange(count))
  first = jax.tree.map(lambda x: x[0], parts)
  _, shapes = jax.eval_shape(part, stats, first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (stats, sums), _ = jax.lax.scan(step, (stats, zeros), parts)
  return stats, sums


def _moving_average(ema: Weights, weights: Weights, decay: float) -> Weights:
  """Of every float; counts are copied."""

  def average(old, new):
    if not jnp.issubdtype(old.dtype, jnp.floating):
      return new
    # In this form, what does not change stays to the last bit.
    return old + (1 - decay) * (new - old)

  return jax.tree.map(average, ema, weights)


def make_eval_step(
  task: Task, model: PureModel
) -> Callable[[Weights, dict[str, Array]], dict[str, Array]]:
  """(weights, batch) -> what the network makes of each record.

  Its results are the columns of `task.predict`; and the batch's own `index` and
  `mask` [B], so that records gathered from many processes are known.
  """

  def eval_step(weights, batch):
    columns, _ = model.apply(
      weights, lambda network: task.predict(network, batch), train=False
    )
    if taken := columns.keys() & {"index", "mask"}:
      raise ValueError(f"predictions must not be called {', '.join(taken)}")
    return {**columns, "index": batch["index"], "mask": batch["mask"]}

  return eval_step
