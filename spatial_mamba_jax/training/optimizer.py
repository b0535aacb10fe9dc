"""AdamW with the authors' decay groups and schedule."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spatial_mamba_jax.training.config import OptimizerConfig


def authors_schedule(
  *, peak: float, first: float, last: float, warmup_steps: int, steps: int
) -> optax.Schedule:
  """Linear warm-up, then a cosine, as the authors' trainer runs timm's.

  Their scheduler is told of a step once it is done, so that the learning rate
  of step s is the curve's at s - 1, and the first two are the same.

  Args:
    peak: learning rate after warm-up.
    first: learning rate of the first step.
    last: what the cosine falls to.
    warmup_steps: steps of warm-up.
    steps: steps of the run, warm-up included.
  """
  warmup = optax.linear_schedule(first, peak, max(warmup_steps, 1))
  cosine = optax.cosine_decay_schedule(
    peak, max(steps - warmup_steps, 1), alpha=last / peak
  )
  curve = optax.join_schedules((warmup, cosine), (warmup_steps,))

  @_with_promotion
  def schedule(step):
    return curve(jnp.maximum(step - 1, 0))

  return schedule


def make_schedule(
  config: OptimizerConfig, *, batch_size: int, warmup_steps: int, steps: int
) -> optax.Schedule:
  """The schedule of a run of some steps, scaled to its batch size."""
  scale = batch_size / config.reference_batch_size
  return authors_schedule(
    peak=scale * config.learning_rate,
    first=scale * config.warmup_learning_rate,
    last=scale * config.min_learning_rate,
    warmup_steps=warmup_steps,
    steps=steps,
  )


def make_optimizer(
  config: OptimizerConfig,
  schedule: optax.Schedule,
  decays: Mapping[str, bool],
  layers: Mapping[str, Any],
) -> optax.GradientTransformation:
  """Clipping by global norm, then AdamW, with a learning rate for each layer.

  Args:
    config: its numbers.
    schedule: of the learning rate.
    decays: for each parameter that is trained, whether it decays
      (`PureModel.decays`). Weights of one dimension do not: biases, norms, D
      and alpha. All others do, A_log and the fusion kernels included, as the
      authors' code has it (its `_no_weight_decay` marks are never read).
    layers: in which layer each parameter lies (`PureModel.layers`). The last
      one has the learning rate itself, each one before it `layer_decay` times
      that of the next.

  Returns:
    A transformation of the gradients of what is trained.
  """
  # Over one vector of all gradients: array by array it would be half of what
  # there is to compile in a training step.
  adam = optax.flatten(
    optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
    )
  )
  chain = optax.chain(
    adam,
    optax.add_decayed_weights(config.weight_decay, dict(decays)),
    _scale_layers(config.layer_decay, layers),
    optax.scale_by_learning_rate(schedule),
  )
  return optax.GradientTransformation(
    lambda params: chain.init({name: params[name] for name in decays}),
    _with_promotion(chain.update),
  )


def _with_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
  """The function, where JAX is not told to forbid promotion of types.

  Optax needs it: it takes a float to the power of a count of steps.
  """

  @functools.wraps(function)
  def with_promotion(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return with_promotion


def _scale_layers(
  decay: float, layers: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Multiplies the updates of a layer by `decay`, to the layers after it."""
  if decay == 1:
    return optax.identity()
  last = max(map(np.max, layers.values()))

  def scale(name, update):
    factor = jnp.asarray(decay ** (last - layers[name]), update.dtype)
    return update * jnp.reshape(
      factor, factor.shape + (1,) * (update.ndim - factor.ndim)
    )

  def scale_all(updates: Any, params: Any) -> Any:
    del params
    return {name: scale(name, update) for name, update in updates.items()}

  return optax.stateless(scale_all)
