"""Weights of any kind, to evaluate or to start a run from."""

import pathlib

import jax
import numpy as np

from spatial_mamba_jax.convert.architecture import (
  abstract_model,
  infer_model,
  with_head_bias,
)
from spatial_mamba_jax.convert.files import (
  Found,
  is_of_weights,
  read_file,
)
from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.names import (
  from_torch,
  is_counter,
  torch_tensors,
)
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.models import ModelConfig, SpatialMamba
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.pure import PureModel, Weights, unstacked
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.checkpoint import RemovedError, open_checkpoint
from spatial_mamba_jax.training.config import TrainingError

# Of reading a checkpoint while its run saves others and removes it.
_ATTEMPTS = 5


def load_weights(
  path: pathlib.Path, model: PureModel, like: Weights
) -> dict[str, Weights]:
  """The weights in a file or directory of any kind, to be evaluated.

  Args:
    path: a checkpoint as `open_checkpoint` takes it, or a file or directory as
      `convert.files.read_file` takes it; relative or with "~", too.
    model: the network that they must fit.
    like: its shapes, on the shardings wanted.

  Returns:
    "ema", a run's moving average, and "raw", the weights themselves. A file
    gives one of the two, which `read_file` chooses.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  path = local_path(path)
  if not is_of_weights(path):
    return _restore(path, like)[1]
  found = read_weights(path)
  name = "ema" if found.is_average else "raw"
  return {name: _fitted(path, found.state_dict, model, like)}


def start_from(
  path: pathlib.Path, model: PureModel, fresh: Weights
) -> tuple[Weights, str]:
  """The weights in a file or directory of any kind, to be trained further.

  Args:
    path: as `load_weights` takes it; of a run, the moving average is taken.
    model: the network that they must fit, except for the head.
    fresh: random weights of it. The head is theirs where `path` has none or one
      of another number of classes; the norm before it where `path` has none.

  Returns:
    The weights, where `fresh` lives, and in words what became of the head.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  num_classes = _architecture(model).num_classes
  found = read_weights(path)
  tensors = {
    name: tensor
    for name, tensor in found.state_dict.items()
    if not name.startswith("outnorm")  # A backbone's, for dense tasks.
  }
  head = tensors.get("head.weight")
  own = []
  # One that is no matrix is refused below.
  fits = head is not None and (head.ndim != 2 or len(head) == num_classes)
  if fits:
    said = f"starting from {path}, head included"
  else:
    classes = "none" if head is None else f"{len(head)} classes"
    said = f"starting from {path} with a head drawn at random: it has {classes}"
    own += ["head.kernel", "head.bias"]
  if head is None and not {"norm.weight", "norm.bias"} & tensors.keys():
    own += ["norm.scale", "norm.bias"]
  tensors |= torch_tensors({name: fresh.params[name] for name in own})
  return _fitted(path, tensors, model, fresh), said + _beside(found)


def _beside(found: Found) -> str:
  """What `start_from` did not take of a file, in words."""
  names = [x for x in found.left_out if not is_counter(x)]
  return f"; left out {len(names)} tensors ({listed(names)})" * bool(names)


def _architecture(model: PureModel) -> ModelConfig:
  network = model.abstract()
  if not isinstance(network, SpatialMamba):
    raise TrainingError(
      f"config.init_from is for classifiers: a {type(network).__name__} cannot"
      " start from other weights"
    )
  return network.config


def _fitted(
  path: pathlib.Path,
  state_dict: dict[str, np.ndarray],
  model: PureModel,
  like: Weights,
) -> Weights:
  """Tensors as the weights of a model, placed like others."""
  filled = abstract_model(_architecture(model))
  try:
    from_torch(filled, with_head_bias(state_dict))
  except ValueError as error:
    raise TrainingError(
      f"{path} holds another model than config.model asks for: {error}"
    ) from error
  weights = PureModel.weights_of(filled)
  return jax.tree.map(_placed_like, weights, like)


def load_model(path: pathlib.Path) -> Trunk:
  """The model in a file or directory of any kind, in eval mode.

  Raises:
    TrainingError: there is none.
  """
  tensors = read_weights(path).state_dict
  try:
    model = infer_model(tensors)
    from_torch(model, tensors)
  except ValueError as error:
    raise TrainingError(f"{path}: {error}") from error
  return model


def read_weights(path: pathlib.Path, *, raw: bool = False) -> Found:
  """The weights in a file or directory of any kind, of whatever model.

  Args:
    path: as `load_weights` takes it.
    raw: whether to take the weights that have a moving average themselves.

  Raises:
    TrainingError: there are no weights.
  """
  path = local_path(path)
  if not is_of_weights(path):
    return read_checkpoint(path, raw=raw)
  try:
    return read_file(path, raw=raw)
  except FileNotFoundError as error:
    raise TrainingError(
      f"{path} does not exist: train first, or mend the path"
    ) from error
  except (ImportError, OSError, ValueError) as error:
    raise TrainingError(one_line(error)) from error


def read_checkpoint(path: pathlib.Path, *, raw: bool = False) -> Found:
  """The weights in one of this project's checkpoints; as `read_weights`."""
  step, weights = _restore(path)
  name = "raw" if raw else "ema"
  if name not in weights:
    raise TrainingError(f"{path} holds one set of weights alone")
  return Found(torch_tensors(unstacked(weights[name])), f"step {step}")


def _restore(
  path: pathlib.Path, like: Weights | None = None
) -> tuple[int, dict[str, Weights]]:
  """The step and the weights of a checkpoint, which a run may remove."""
  for attempt in range(_ATTEMPTS):
    try:
      with open_checkpoint(path) as (checkpoints, step):
        return step, checkpoints.restore_weights(step, like)
    except RemovedError:
      if attempt == _ATTEMPTS - 1:
        raise
  raise AssertionError


def _placed_like(
  x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
  # `device_put` cannot reach other processes' devices.
  values = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: values[index]
  )
