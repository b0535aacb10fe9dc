"""A network as pure functions of its weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.struct
import jax
import numpy as np
from flax import nnx
from spatial_mamba_kernels.typing import Array

from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.fsdp import gather
from spatial_mamba_jax.models.initializers import Streams
from spatial_mamba_jax.models.stage import Stage

T = TypeVar("T")

# {path: array}. An array at a path like "stages.0.blocks.mixer.in_proj.kernel"
# has the weights of all blocks of the stage. The type is Any, because JAX and
# orbax rebuild such trees with shapes or options as leaves.
Arrays = Any

# The path of a weight of a block, stacked or not.
_OF_BLOCKS = re.compile(r"(?:^|.*\.)stages\.\d+\.blocks\.")
# The path of stacked weights: no index follows "blocks".
_STACKED = re.compile(r"((?:^|.*\.)stages\.\d+\.blocks)\.(?!\d+\.)(.*)")
# Parts of a backbone whose layers have their own learning rates, and parts that
# have the head's learning rate.
LAYERED = ("stem", "stages", "downsamples")
_NORMS = ("norm", "norms")


@flax.struct.dataclass
class Weights:
  """The weights of a model.

  Attributes:
    params: {path: array}, the parameters.
    stats: {path: array}, the running statistics of BatchNorm.
  """

  params: Arrays
  stats: Arrays


class PureModel:
  """A network as pure functions of `Weights`.

  The weights of a stage's blocks are stacked, if the blocks have the same
  structure.

  Attributes:
    shapes: the weights' shapes and dtypes.
    decays: {path of a trained parameter: whether weight decay applies}. It
      applies if one block's parameter has two dimensions or more.
    layers: {path of a parameter: index of its layer}, for layer-wise learning
      rates: 0 for the stem of a backbone, then an index for each block (an
      array for stacked blocks); the last index for everything else.
  """

  def __init__(
    self,
    create: Callable[..., nnx.Module],
    *,
    linear_probe: bool = False,
  ):
    """Traces the network; computes nothing.

    Args:
      create: (rngs=nnx.Rngs) -> the network, in any mode. Its backbone may have
        any path.
      linear_probe: whether the backbone is frozen: its parameters are not
        trained, and its BatchNorm and drop path stay in eval mode.
    """
    self._create = create
    model = self.abstract()
    for path, variable in nnx.to_flat_state(nnx.state(model)):
      if not isinstance(variable, nnx.Param | nnx.BatchStat):
        raise ValueError(
          f"{_name(path)} is neither a parameter nor a statistic of BatchNorm:"
          " give random streams (rngs) to the network's call"
        )
    self.shapes = jax.eval_shape(_weights_of, *nnx.split(model))
    trunks = backbones(model)
    stacked = nnx.eval_shape(lambda: _stack(self._fresh()))
    self._paths = {
      _name(path): (path, type(variable))
      for path, variable in nnx.to_flat_state(nnx.state(stacked))
    }
    self.decays = {
      name: x.ndim - is_stacked(name) > 1
      for name, x in self.shapes.params.items()
      if not (linear_probe and _trunk_part(name, trunks))
    }
    self.layers = _layers(self.shapes.params, trunks)
    stacked.eval()
    self._eval_graphdef = nnx.graphdef(stacked)
    stacked.train()
    if linear_probe:
      for _, module in nnx.iter_graph(stacked):
        if isinstance(module, Trunk):
          module.eval()
    self._train_graphdef = nnx.graphdef(stacked)

  def _fresh(self, key: Any = 0) -> nnx.Module:
    return self._create(rngs=Streams(key))

  def abstract(self) -> nnx.Module:
    """Returns the network with shapes instead of arrays."""
    return nnx.eval_shape(self._fresh)

  def init(self, key: Array) -> Weights:
    """Returns fresh weights. Call it under `jit`."""
    return self.weights_of(self._fresh(key))

  @staticmethod
  def weights_of(model: nnx.Module) -> Weights:
    """Returns the weights of a network like this one."""
    return _weights_of(*nnx.split(model))

  def bind(self, weights: Weights) -> Any:
    """Returns a network with these weights, in eval mode."""
    model = self.abstract()
    arrays = unstacked(weights)
    state = [
      (path, type(variable)(arrays[_name(path)]))
      for path, variable in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(state))
    model.eval()
    return model

  def trained(self, params: Arrays) -> Arrays:
    """Returns the parameters that are trained."""
    return {name: params[name] for name in self.decays}

  def apply(
    self, weights: Weights, function: Callable[[Any], T], *, train: bool
  ) -> tuple[T, Arrays]:
    """Calls a function with the network.

    Args:
      weights: the network's weights.
      function: takes the network, and returns any result.
      train: whether the network is in training mode rather than eval mode.

    Returns:
      The function's result, and the new running statistics.
    """
    graphdef = self._train_graphdef if train else self._eval_graphdef
    arrays = {**weights.params, **weights.stats}
    state = nnx.from_flat_state(
      [
        # A stage gathers the parameters of a block when it runs.
        (path, kind(x if _OF_BLOCKS.match(name) else gather(x)))
        for name, (path, kind) in self._paths.items()
        for x in (arrays[name],)
      ]
    )
    model = nnx.merge(graphdef, state)
    return function(model), _arrays(model, nnx.BatchStat)


def backbones(network: nnx.Module) -> dict[str, Trunk]:
  """Returns {path: backbone} of a network; the path of a classifier is ""."""
  return {
    _name(path): module
    for path, module in nnx.iter_graph(network)
    if isinstance(module, Trunk)
  }


def is_stacked(name: str) -> bool:
  """Returns whether a path has stacked weights."""
  return _STACKED.fullmatch(name) is not None


def first_block(name: str) -> str:
  """Returns the path in a network of stacked weights, in their first block."""
  return _STACKED.sub(r"\1.0.\2", name)


def unstacked(weights: Weights) -> dict[str, Array]:
  """Returns {path: array} with a path for each block, as in a network."""
  arrays = {}
  for name, array in {**weights.params, **weights.stats}.items():
    match = _STACKED.fullmatch(name)
    if match is None:
      arrays[name] = array
      continue
    for i, block_array in enumerate(array):
      arrays[f"{match[1]}.{i}.{match[2]}"] = block_array
  return arrays


def _weights_of(graphdef: Any, state: Any) -> Weights:
  model = _stack(nnx.merge(graphdef, state))
  return Weights(_arrays(model, nnx.Param), _arrays(model, nnx.BatchStat))


def _stack(model: nnx.Module) -> nnx.Module:
  stages = [x for _, x in nnx.iter_graph(model) if isinstance(x, Stage)]
  for stage in stages:
    stage.stack()
  return model


def _arrays(model: nnx.Module, kind: type) -> Arrays:
  return {
    _name(path): variable[...]
    for path, variable in nnx.to_flat_state(nnx.state(model, kind))
  }


def _name(path: tuple[Any, ...]) -> str:
  return ".".join(map(str, path))


def _trunk_part(
  name: str, trunks: Mapping[str, Trunk]
) -> tuple[Trunk, list[str]] | None:
  """Returns a parameter's backbone and path in it; None if it is in none."""
  for prefix, trunk in trunks.items():
    if not prefix or name.startswith(f"{prefix}."):
      parts = name.removeprefix(f"{prefix}." if prefix else "").split(".")
      if parts[0] in (*LAYERED, *_NORMS):
        return trunk, parts
  return None


def _layers(
  params: Mapping[str, Any], trunks: Mapping[str, Trunk]
) -> dict[str, int | np.ndarray]:
  deepest = max((sum(x.config.depths) for x in trunks.values()), default=0)
  layers = {}
  for name in params:
    layers[name] = 1 + deepest
    if found := _trunk_part(name, trunks):
      trunk, parts = found
      if parts[0] in LAYERED:
        layers[name] = _layer(parts, trunk.config.depths)
  return layers


def _layer(parts: list[str], depths: tuple[int, ...]) -> int | np.ndarray:
  """Returns the layer index of a backbone's parameter, given its path."""
  if parts[0] == "stem":
    return 0
  stage = int(parts[1])
  first = 1 + sum(depths[:stage])
  if parts[0] == "downsamples":  # Belongs to the block after it.
    return first + depths[stage]
  if parts[3].isdecimal():
    return first + int(parts[3])
  return first + np.arange(depths[stage])
