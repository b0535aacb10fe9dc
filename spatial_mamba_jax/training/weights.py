"""Weights of any kind, to evaluate or to start a run from."""

import pathlib
from typing import cast

import jax
import numpy as np

from spatial_mamba_jax.convert.architecture import abstract_model
from spatial_mamba_jax.convert.files import Found, is_of_weights, read_file
from spatial_mamba_jax.convert.names import from_torch, torch_tensors
from spatial_mamba_jax.models import ModelConfig, SpatialMamba
from spatial_mamba_jax.training.checkpoint import open_checkpoint
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.state import PureModel, Weights, unstacked


def load_weights(
  path: pathlib.Path, config: ModelConfig, like: Weights
) -> dict[str, Weights]:
  """The weights in a file or directory of any kind, to be evaluated.

  Args:
    path: a checkpoint as `open_checkpoint` takes it, or a file or directory as
      `convert.files.read_file` takes it.
    config: the architecture that they must fit.
    like: its shapes, on the shardings wanted.

  Returns:
    A run's moving average, "ema", and the weights themselves, "raw"; of a file
    that of them which `read_file` takes.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  if not is_of_weights(path):
    with open_checkpoint(path) as (checkpoints, step):
      return checkpoints.restore_weights(step, like)
  found = read_weights(path)
  model = abstract_model(config)
  try:
    from_torch(model, found.state_dict)
  except ValueError as error:
    raise TrainingError(
      f"{path} holds another model than config.model asks for: {error}"
    ) from error
  weights = PureModel.weights_of(cast(SpatialMamba, model))
  name = "ema" if found.key == "model_ema" else "raw"
  return {name: jax.tree.map(_placed_like, weights, like)}


def read_weights(path: pathlib.Path, *, raw: bool = False) -> Found:
  """The weights in a file or directory of any kind, of whatever model.

  Args:
    path: as `load_weights` takes it.
    raw: whether to take the weights that have a moving average themselves.

  Raises:
    TrainingError: there are no weights.
  """
  if not is_of_weights(path):
    return read_checkpoint(path, raw=raw)
  try:
    return read_file(path, raw=raw)
  except FileNotFoundError as error:
    raise TrainingError(
      f"{path} does not exist: train first, or mend the path"
    ) from error
  except (ImportError, OSError, ValueError) as error:
    raise TrainingError(str(error)) from error


def read_checkpoint(path: pathlib.Path, *, raw: bool = False) -> Found:
  """The weights in one of this project's checkpoints; as `read_weights`."""
  with open_checkpoint(path) as (checkpoints, step):
    weights = checkpoints.restore_weights(step)
  name = "raw" if raw else "ema"
  if name not in weights:
    raise TrainingError(f"{path} holds one set of weights alone")
  return Found(torch_tensors(unstacked(weights[name])), f"step {step}")


def _placed_like(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  # `device_put` cannot reach other processes' devices.
  values = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: values[index]
  )
