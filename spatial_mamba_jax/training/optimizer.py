"""AdamW with the authors' decay groups and schedule."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from spatial_mamba_kernels.typing import Array

from spatial_mamba_jax.convert.families import table_of
from spatial_mamba_jax.models.pure import Arrays, PureModel, first_block
from spatial_mamba_jax.training.config import OptimizerConfig, TrainingError
from spatial_mamba_jax.training.shard_vector import ShardVector


def authors_schedule(
  *, peak: float, first: float, last: float, warmup_steps: int, steps: int
) -> optax.Schedule:
  """Returns linear warm-up and a cosine, as the authors' trainer runs timm's.

  Their trainer updates the scheduler after each step. So step s has the
  learning rate of the curve at s - 1, and the first two steps have the same.

  Args:
    peak: learning rate after warm-up.
    first: learning rate of the first step.
    last: final value of the cosine.
    warmup_steps: steps of warm-up.
    steps: steps of the run, including warm-up.
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


def linear_schedule(
  *, peak: float, first: float, last: float, warmup_steps: int, steps: int
) -> optax.Schedule:
  """Returns linear warm-up and linear decay, as mmengine runs them.

  They are its LinearLR, and its PolyLR of power 1. The last step of warm-up and
  the first step after it have the peak rate; the last step has the rate `last`.

  Args:
    peak: learning rate after warm-up.
    first: learning rate of the first step.
    last: learning rate of the last step.
    warmup_steps: steps of warm-up.
    steps: steps of the run, including warm-up.
  """
  warmup = optax.linear_schedule(first, peak, max(warmup_steps - 1, 1))
  decay = optax.linear_schedule(peak, last, max(steps - warmup_steps - 1, 1))
  return _with_promotion(optax.join_schedules((warmup, decay), (warmup_steps,)))


SCHEDULES = {"cosine": authors_schedule, "linear": linear_schedule}


def make_schedule(
  config: OptimizerConfig, *, batch_size: int, warmup_steps: int, steps: int
) -> optax.Schedule:
  """Returns the schedule of a run, scaled to its batch size."""
  scale = batch_size / config.reference_batch_size
  return SCHEDULES[config.schedule](
    peak=scale * config.learning_rate,
    first=scale * config.warmup_learning_rate,
    last=scale * config.min_learning_rate,
    warmup_steps=warmup_steps,
    steps=steps,
  )


class Optimizer(NamedTuple):
  """An optax transformation that also returns the gradients' global norm.

  Attributes:
    init: (parameters) -> the optimizer's state.
    update: (gradients, state, parameters) -> (updates, state, norm). Adding the
      updates to the parameters is the caller's work.
  """

  init: Callable[[Arrays], Any]
  update: Callable[[Arrays, Any, Arrays], tuple[Arrays, Any, Array]]


def make_optimizer(
  config: OptimizerConfig,
  schedule: optax.Schedule,
  model: PureModel,
  mesh: Mesh | None = None,
) -> Optimizer:
  """Returns clipping by global norm, then AdamW with a rate for each layer.

  With the authors' recipe for classification, weights of one dimension do not
  decay: biases, norms, D and alpha. All others do, including A_log and the
  fusion kernels, as in the authors' code (it never reads its
  `_no_weight_decay` marks). `OptimizerConfig.undecayed` has the other rule.

  The last layer has the scheduled learning rate. Each layer before it has
  `layer_decay` times the rate of the next.

  Args:
    config: the optimizer's settings.
    schedule: schedule of the learning rate.
    model: the network whose parameters are trained.
    mesh: the devices that share the parameters; None for one device.
  """
  vector = ShardVector.on(mesh, model.trained(model.shapes.params))
  chain = optax.chain(
    vector.transform(
      optax.chain(
        _clip_by_norm(config.clip_norm),
        optax.scale_by_adam(
          b1=config.beta1, b2=config.beta2, eps=config.epsilon
        ),
      )
    ),
    optax.add_decayed_weights(
      config.weight_decay, decays(config.undecayed, model)
    ),
    _scale_layers(config.layer_decay, model.layers),
    optax.scale_by_learning_rate(schedule),
  )

  @_with_promotion
  def update(gradients, state, params):
    norm = vector.norm(gradients)
    updates, state = chain.update(gradients, state, params, norm=norm)
    return updates, state, norm

  return Optimizer(lambda params: chain.init(model.trained(params)), update)


def decays(undecayed: str, model: PureModel) -> dict[str, bool]:
  """Returns {path of a trained parameter: whether weight decay applies}.

  Args:
    undecayed: `OptimizerConfig.undecayed`.
    model: the network.

  Raises:
    TrainingError: the authors have no names for the network's parameters.
  """
  if undecayed == "vectors":
    return dict(model.decays)
  try:
    table = table_of(model.abstract())
  except ValueError as error:
    raise TrainingError(
      f"config.optimizer.undecayed={undecayed} needs names: {error}"
    ) from error
  return {
    path: not any("norm" in name for name in table.tensors(first_block(path)))
    for path in model.decays
  }


def _clip_by_norm(
  most: float,
) -> optax.GradientTransformationExtraArgs:
  """Clips a vector of shards as `optax.clip_by_global_norm` clips arrays.

  `update` takes the global norm, because one device has only its own shards.
  """

  def update(updates, state, params=None, **extra):
    del params
    norm = extra["norm"]
    clipped = (updates / norm.astype(updates.dtype)) * most
    return jax.lax.select(norm < most, updates, clipped), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _with_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
  """Lets a function of optax promote types, which JAX may be told to forbid.

  Optax raises a float to the power of the number of steps.
  """

  @functools.wraps(function)
  def with_promotion(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return with_promotion


def _scale_layers(
  decay: float, layers: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Multiplies the updates of a layer by `decay` for each layer after it."""
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
