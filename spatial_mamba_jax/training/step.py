"""One training step and one evaluation step, pure functions over arrays.

Axis letters: B batch, H and W height and width, K classes.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from spatial_mamba_kernels.typing import Array

from spatial_mamba_jax.training.config import TrainConfig
from spatial_mamba_jax.training.losses import soft_cross_entropy
from spatial_mamba_jax.training.preprocess import Preprocess, normalise
from spatial_mamba_jax.training.state import (
  Arrays,
  PureModel,
  TrainState,
  Weights,
)


def make_train_step(
  model: PureModel,
  optimizer: optax.GradientTransformation,
  preprocess: Preprocess,
  config: TrainConfig,
  *,
  epoch_steps: int,
) -> Callable[[TrainState, dict[str, Array]], TrainState]:
  """The step of a run: forward, backward, update, moving average.

  All that is random in it follows from the seed and the number of the step.

  Args:
    model: the model as a pure function.
    optimizer: whose state is in the `TrainState`.
    preprocess: applied to each batch on the device.
    config: the experiment.
    epoch_steps: steps an epoch, to know when MESA begins.

  Returns:
    (state, batch) -> state, to be jitted with the state donated.
  """
  mesa_from = int(config.mesa_start * config.epochs) * epoch_steps

  def loss(trained, weights, images, target, teacher, key):
    params = {**weights.params, **trained}
    logits, stats = model.train(Weights(params, weights.stats), images, key)
    value = jnp.mean(soft_cross_entropy(logits, target))
    if teacher is not None:
      mesa = jnp.mean(soft_cross_entropy(logits, teacher))
      value += config.mesa_weight * mesa
    hits = jnp.argmax(logits, -1) == jnp.argmax(target, -1)
    return value, (stats, jnp.sum(hits))

  def teach(state, images):
    """The moving average's predictions; of no weight before MESA begins."""
    if not config.mesa_weight:
      return None
    classes = config.model.num_classes
    silent = jnp.zeros((images.shape[0], classes), state_dtype(state))
    return jax.lax.cond(
      state.step >= mesa_from,
      lambda: jax.nn.softmax(model.evaluate(state.ema, images)),
      lambda: silent,
    )

  def gradients(state, batch, key):
    def part(stats, part_of_batch):
      batch, index = part_of_batch
      data_key, model_key = jax.random.split(jax.random.fold_in(key, index))
      images, target = preprocess(batch, data_key)
      (value, (stats, hits)), grads = jax.value_and_grad(loss, has_aux=True)(
        model.trained(state.weights.params),
        Weights(state.weights.params, stats),
        images,
        target,
        teach(state, images),
        model_key,
      )
      return stats, (grads, value, hits)

    count = config.accumulation_steps
    if count == 1:
      stats, out = part(state.weights.stats, (batch, 0))
      return stats, *out
    stats, (grads, values, hits) = _accumulate(
      part, state.weights.stats, _split_batch(batch, count), count
    )
    mean = jax.tree.map(lambda x: x / count, (grads, values))
    return stats, *mean, hits

  def train_step(state, batch):
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    stats, grads, value, hits = gradients(state, batch, key)
    # Of one vector, as the optimizer has it.
    grad_norm = optax.tree.norm(ravel_pytree(grads)[0])
    trained = model.trained(state.weights.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = cast(Arrays, optax.apply_updates(trained, updates))
    weights = Weights({**state.weights.params, **trained}, stats)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    images = next(iter(batch.values())).shape[0]
    sums = {
      "loss": value,
      "correct": hits,
      "grad_norm": grad_norm,
      "images": images,
      "steps": 1,
    }
    return TrainState(
      step=state.step + 1,
      weights=weights,
      ema=_moving_average(state.ema, weights, config.ema_decay),
      opt_state=opt_state,
      window=jax.tree.map(
        lambda old, new: old + jnp.asarray(new, old.dtype), state.window, sums
      ),
      bad_step=jnp.where(
        (state.bad_step < 0) & ~finite, state.step + 1, state.bad_step
      ),
    )

  return train_step


def state_dtype(state: TrainState) -> Any:
  """The precision of the parameters."""
  return jnp.result_type(*jax.tree.leaves(state.weights.params))


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
  model: PureModel,
) -> Callable[[Weights, dict[str, Array]], Arrays]:
  """(weights, batch) -> what the model makes of each image, {name: array}.

  `index`, `label`, `mask` [B]: the batch's own, so that images gathered from
    many processes are known.
  `predicted` [B]: the class that scores highest; -1 where there is not one, for
    ties and for logits that are not finite.
  `rank` [B]: the number of other classes that score no less than the label.
  `loss` [B]: cross-entropy in nats; NaN where the logits are not finite.
  `top_classes`, `top_probabilities` [B, min(5, K)]: the likeliest classes.
  """

  def eval_step(weights, batch):
    logits = model.evaluate(weights, normalise(batch["image"]))
    log_probabilities = jax.nn.log_softmax(logits)
    label = batch["label"][:, None]
    loss = -jnp.take_along_axis(log_probabilities, label, axis=-1)[:, 0]
    # NaN is not less than anything, so that it ranks before the label.
    own = jnp.take_along_axis(logits, label, axis=-1)
    rank = jnp.sum(~(logits < own), axis=-1) - 1
    highest = jnp.max(logits, axis=-1, keepdims=True)
    is_single = jnp.sum(logits == highest, axis=-1) == 1
    top, top_classes = jax.lax.top_k(
      log_probabilities, min(5, logits.shape[-1])
    )
    return {
      "index": batch["index"],
      "label": batch["label"],
      "mask": batch["mask"],
      "predicted": jnp.where(
        is_single & ~jnp.isnan(loss), jnp.argmax(logits, axis=-1), -1
      ),
      "rank": rank,
      "loss": loss,
      "top_classes": top_classes,
      "top_probabilities": jnp.exp(top),
    }

  return eval_step
