"""Reads weights in any format, to evaluate them or to start a run from them."""

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

# Attempts to read a checkpoint, which its run may remove meanwhile.
_ATTEMPTS = 5


def load_weights(
  path: pathlib.Path, model: PureModel, like: Weights
) -> dict[str, Weights]:
  """Reads the weights in a file or directory, to evaluate them.

  Args:
    path: a checkpoint (see `open_checkpoint`), or a file or directory of
      weights (see `convert.files.read_file`); may be relative or begin with
      "~".
    model: the network.
    like: the shapes and shardings of the network's weights.

  Returns:
    The moving average, "ema", and the weights themselves, "raw". Of a file,
    `read_file` chooses one of the two.

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
  """Reads the weights in a file or directory, to train them further.

  Args:
    path: as for `load_weights`; of a run, the moving average is read.
    model: the network, which may have another head than the weights.
    fresh: random weights of the network. They replace a head that is missing
      or has another number of classes, and a missing norm before the head.

  Returns:
    The weights, with the shardings of `fresh`, and a message about the head.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  num_classes = _architecture(model).num_classes
  found = read_weights(path)
  tensors = {
    name: tensor
    for name, tensor in found.state_dict.items()
    if not name.startswith("outnorm")  # Norms of a backbone's outputs.
  }
  head = tensors.get("head.weight")
  from_fresh = []
  # `_fitted` refuses a head that is not a matrix.
  fits = head is not None and (head.ndim != 2 or len(head) == num_classes)
  if fits:
    message = f"starting from {path}, including its head"
  else:
    found_head = "no head" if head is None else f"{len(head)} classes"
    message = f"starting from {path}, with a random head: it has {found_head}"
    from_fresh += ["head.kernel", "head.bias"]
  if head is None and not {"norm.weight", "norm.bias"} & tensors.keys():
    from_fresh += ["norm.scale", "norm.bias"]
  tensors |= torch_tensors({name: fresh.params[name] for name in from_fresh})
  weights = _fitted(path, tensors, model, fresh)
  return weights, message + _left_out(found)


def _left_out(found: Found) -> str:
  """Returns the end of a message that names the tensors left out."""
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
  """Converts tensors to the weights of a model, sharded as `like`."""
  filled = abstract_model(_architecture(model))
  try:
    from_torch(filled, with_head_bias(state_dict))
  except ValueError as error:
    raise TrainingError(
      f"{path} holds a model other than config.model: {error}"
    ) from error
  weights = PureModel.weights_of(filled)
  return jax.tree.map(_sharded_like, weights, like)


def load_model(path: pathlib.Path) -> Trunk:
  """Reads the model in a file or directory, in eval mode.

  Args:
    path: as for `load_weights`.

  Raises:
    TrainingError: there is no model.
  """
  tensors = read_weights(path).state_dict
  try:
    model = infer_model(tensors)
    from_torch(model, tensors)
  except ValueError as error:
    raise TrainingError(f"{path}: {error}") from error
  return model


def read_weights(path: pathlib.Path, *, raw: bool = False) -> Found:
  """Reads the weights in a file or directory, of any Spatial-Mamba.

  Args:
    path: as for `load_weights`.
    raw: whether to prefer the weights themselves to their moving average.

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
      f"{path} does not exist: train first, or correct the path"
    ) from error
  except (ImportError, OSError, ValueError) as error:
    raise TrainingError(one_line(error)) from error


def read_checkpoint(path: pathlib.Path, *, raw: bool = False) -> Found:
  """Reads the weights of a checkpoint of this project; see `read_weights`."""
  step, weights = _restore(path)
  name = "raw" if raw else "ema"
  if name not in weights:
    raise TrainingError(f"{path} has no raw weights, only one set")
  return Found(torch_tensors(unstacked(weights[name])), f"step {step}")


def _restore(
  path: pathlib.Path, like: Weights | None = None
) -> tuple[int, dict[str, Weights]]:
  """Restores the step and the weights of a checkpoint, retrying if removed."""
  for attempt in range(_ATTEMPTS):
    try:
      with open_checkpoint(path) as (checkpoints, step):
        return step, checkpoints.restore_weights(step, like)
    except RemovedError:
      if attempt == _ATTEMPTS - 1:
        raise
  raise AssertionError


def _sharded_like(
  x: jax.Array, like: jax.Array | jax.ShapeDtypeStruct
) -> jax.Array:
  # `device_put` cannot reach devices of other processes.
  values = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: values[index]
  )
