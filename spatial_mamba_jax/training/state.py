"""All that a training step changes, and the model as a pure function of it."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.models import ModelConfig, SpatialMamba

# {path: array}, e.g. of "stages.0.blocks.1.mixer.in_proj.kernel". No stricter,
# because JAX and orbax rebuild trees with shapes or options for arrays.
Arrays = Any


@flax.struct.dataclass
class Weights:
  """What a model needs to be applied.

  Attributes:
    params: {path: array} that the optimizer changes.
    stats: {path: array}, the running statistics of BatchNorm.
  """

  params: Arrays
  stats: Arrays


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

  step: Int[Array, ""]
  weights: Weights
  ema: Weights
  opt_state: optax.OptState
  window: dict[str, Float[Array, ""]]
  bad_step: Int[Array, ""]


class PureModel:
  """A model as functions over `Weights`.

  Attributes:
    shapes: the weights' shapes and types.
  """

  def __init__(self, config: ModelConfig):
    self._config = config
    model = nnx.eval_shape(lambda: SpatialMamba(config, rngs=nnx.Rngs(0)))
    self._paths = {
      ".".join(map(str, path)): (path, type(variable))
      for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    model.train()
    self._train_graphdef = nnx.graphdef(model)
    model.eval()
    self._eval_graphdef, state = nnx.split(model)
    self.shapes = jax.eval_shape(
      lambda state: self.weights_of(nnx.merge(self._eval_graphdef, state)),
      state,
    )

  def init(self, key: Array) -> Weights:
    """Fresh weights, to be called under `jit`."""
    return self.weights_of(SpatialMamba(self._config, rngs=nnx.Rngs(key)))

  def weights_of(self, model: SpatialMamba) -> Weights:
    """The weights of a model of this architecture."""

    def arrays(kind):
      return {
        ".".join(map(str, path)): variable[...]
        for path, variable in nnx.to_flat_state(nnx.state(model, kind))
      }

    return Weights(params=arrays(nnx.Param), stats=arrays(nnx.BatchStat))

  def bind(self, weights: Weights) -> SpatialMamba:
    """A model with these weights, in eval mode."""
    return self._merge(self._eval_graphdef, weights)

  def train(
    self, weights: Weights, images: Float[Array, "B H W 3"], key: Array
  ) -> tuple[Float[Array, "B K"], Arrays]:
    """Logits in training mode, and the new statistics."""
    model = self._merge(self._train_graphdef, weights)
    logits = model(images, rngs=nnx.Rngs(drop_path=key))
    return logits, self.weights_of(model).stats

  def evaluate(
    self, weights: Weights, images: Float[Array, "B H W 3"]
  ) -> Float[Array, "B K"]:
    """Logits in eval mode."""
    return self.bind(weights)(images)

  def _merge(self, graphdef: Any, weights: Weights) -> SpatialMamba:
    arrays = {**weights.params, **weights.stats}
    state = nnx.from_flat_state(
      [(path, kind(arrays[name])) for name, (path, kind) in self._paths.items()]
    )
    return nnx.merge(graphdef, state)


def create_state(
  model: PureModel,
  optimizer: optax.GradientTransformation,
  seed: int,
  sharding: Any,
) -> TrainState:
  """A fresh state, made where it is to live."""
  # Drawing numbers is little work in a large program: on a CPU, optimising it
  # would take longer than compiling the training step.
  quickly = {"xla_backend_optimization_level": 0}
  on_cpu = jax.default_backend() == "cpu"
  return jax.jit(
    lambda: initial_state(model.init(jax.random.key(seed)), optimizer),
    out_shardings=sharding,
    compiler_options=quickly if on_cpu else None,
  )()


def state_shapes(
  model: PureModel, optimizer: optax.GradientTransformation
) -> TrainState:
  """The shapes and types of a state."""
  return jax.eval_shape(
    partial(initial_state, optimizer=optimizer), model.shapes
  )


def initial_state(
  weights: Weights, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state at step 0 of a run that starts from `weights`."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    weights=weights,
    ema=jax.tree.map(jnp.copy, weights),
    opt_state=optimizer.init(weights.params),
    window=empty_window(),
    bad_step=jnp.full((), -1, jnp.int32),
  )


def empty_window() -> dict[str, Float[Array, ""]]:
  """Sums of nothing: of loss, correct images, gradient norm, images, steps."""
  names = ("loss", "correct", "grad_norm", "images", "steps")
  return {name: jnp.zeros((), jnp.result_type(float)) for name in names}
