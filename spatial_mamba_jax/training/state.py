"""All that a training step changes, and the model as a pure function of it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.models import ModelConfig, SpatialMamba

# {path: array}, e.g. of "stages.0.blocks.mixer.in_proj.kernel" of all blocks of
# the stage. No stricter, because JAX and orbax rebuild trees with shapes or
# options for arrays.
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

  step: Int[Any, ""]
  weights: Weights
  ema: Weights
  opt_state: optax.OptState
  window: dict[str, Float[Any, ""]]
  bad_step: Int[Any, ""]


class PureModel:
  """A model as functions over `Weights`, the blocks of each stage stacked.

  Attributes:
    shapes: the weights' shapes and types.
    decays: {path of a parameter that is trained: whether it, or one block's
      part of it, has two dimensions or more}.
    layers: {path: number of the layer}, 0 for the stem, then a number for each
      block (an array for the blocks of a stage), last the head.
  """

  def __init__(self, config: ModelConfig, *, linear_probe: bool = False):
    """With `linear_probe`, training is of the head alone.

    All else then is what it is in eval mode, BatchNorm and drop path included.
    """
    self._config = config
    model = nnx.eval_shape(self._fresh)
    self.shapes = jax.eval_shape(_weights_of, *nnx.split(model))
    stacked = nnx.eval_shape(lambda: _stack(self._fresh()))
    self._paths = {
      _name(path): (path, type(variable))
      for path, variable in nnx.to_flat_state(nnx.state(stacked))
    }
    # Those of a block have one axis for which block it is.
    self.decays = {
      name: x.ndim - (".blocks." in name) > 1
      for name, x in self.shapes.params.items()
      if name.startswith("head.") or not linear_probe
    }
    self.layers = {
      name: _layer(name, config.depths) for name in self.shapes.params
    }
    stacked.eval()
    self._eval_graphdef = nnx.graphdef(stacked)
    if not linear_probe:
      stacked.train()
    self._train_graphdef = nnx.graphdef(stacked)

  def _fresh(self, key: Any = 0) -> SpatialMamba:
    return SpatialMamba(self._config, rngs=nnx.Rngs(key))

  def init(self, key: Array) -> Weights:
    """Fresh weights, to be called under `jit`."""
    return self.weights_of(self._fresh(key))

  @staticmethod
  def weights_of(model: SpatialMamba) -> Weights:
    """The weights of a model of this architecture."""
    return _weights_of(*nnx.split(model))

  def bind(self, weights: Weights) -> SpatialMamba:
    """A model with these weights, in eval mode."""
    model = nnx.eval_shape(self._fresh)
    arrays = {**weights.params, **weights.stats}
    state = [
      (path, type(variable)(arrays[_name(path)][_place(path)]))
      for path, variable in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(state))
    return model

  def trained(self, params: Arrays) -> Arrays:
    """Those of the parameters that training changes."""
    return {name: params[name] for name in self.decays}

  def train(
    self, weights: Weights, images: Float[Array, "B H W 3"], key: Array
  ) -> tuple[Float[Array, "B K"], Arrays]:
    """Logits in training mode, and the new statistics."""
    model = self._merge(self._train_graphdef, weights)
    logits = model(images, rngs=nnx.Rngs(drop_path=key))
    # Blocks have none.
    return logits, _arrays(model, nnx.BatchStat)

  def evaluate(
    self, weights: Weights, images: Float[Array, "B H W 3"]
  ) -> Float[Array, "B K"]:
    """Logits in eval mode."""
    return self._merge(self._eval_graphdef, weights)(images)

  def _merge(self, graphdef: Any, weights: Weights) -> SpatialMamba:
    arrays = {**weights.params, **weights.stats}
    state = nnx.from_flat_state(
      [(path, kind(arrays[name])) for name, (path, kind) in self._paths.items()]
    )
    return nnx.merge(graphdef, state)


def unstacked(weights: Weights) -> dict[str, Array]:
  """{path in a model: array}, of each block by itself."""
  arrays = {}
  for name, stacked in {**weights.params, **weights.stats}.items():
    if ".blocks." not in name:
      arrays[name] = stacked
      continue
    for i, array in enumerate(stacked):
      arrays[name.replace(".blocks.", f".blocks.{i}.", 1)] = array
  return arrays


def _weights_of(graphdef: Any, state: Any) -> Weights:
  model = _stack(nnx.merge(graphdef, state))
  return Weights(_arrays(model, nnx.Param), _arrays(model, nnx.BatchStat))


def _stack(model: SpatialMamba) -> SpatialMamba:
  for stage in model.stages:
    stage.stack()
  return model


def _arrays(model: SpatialMamba, kind: type) -> Arrays:
  return {
    _name(path): variable[...]
    for path, variable in nnx.to_flat_state(nnx.state(model, kind))
  }


def _name(path: tuple[Any, ...]) -> str:
  """Of a weight, the same for all blocks of a stage."""
  if "blocks" in path:
    place = path.index("blocks") + 1
    path = (*path[:place], *path[place + 1 :])
  return ".".join(map(str, path))


def _layer(name: str, depths: Sequence[int]) -> int | np.ndarray:
  part, _, rest = name.partition(".")
  if part == "stem":
    return 0
  if part not in ("stages", "downsamples"):
    return 1 + sum(depths)
  stage = int(rest.split(".")[0])
  first = 1 + sum(depths[:stage])
  if part == "downsamples":  # Belongs to the block after it.
    return first + depths[stage]
  return first + np.arange(depths[stage])


def _place(path: tuple[Any, ...]) -> Any:
  """Where a weight lies in the array of its name: which block, or all of it."""
  return path[path.index("blocks") + 1] if "blocks" in path else ...


# Compiler options, by platform. Drawing numbers is little work in a large
# program, that takes longer to optimise than to run.
_QUICKLY = {
  "cpu": {"xla_backend_optimization_level": 0},
  "tpu": {"optimization_level": 9},  # XLA's name of it is O0.
}


def create_state(
  model: PureModel,
  optimizer: optax.GradientTransformation,
  seed: int,
  sharding: Any,
) -> TrainState:
  """A fresh state, made where it is to live."""
  return jax.jit(
    lambda: initial_state(model.init(jax.random.key(seed)), optimizer),
    out_shardings=sharding,
    compiler_options=_QUICKLY.get(jax.default_backend()),
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
