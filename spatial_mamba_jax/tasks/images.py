"""Checks of data and model that tasks on RGB images share."""

from typing import Any

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.sources import open_source
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.config import ModelConfig


def check_channels(model: ModelConfig, data: DataConfig) -> None:
  """Checks that a model takes RGB images.

  Raises:
    UserError: it takes other images.
  """
  if model.in_channels != 3:
    raise UserError(
      f"config.model.in_channels must be 3 for images of {data.name}, got"
      f" {model.in_channels}"
    )


def open_classes(data: DataConfig, split: str, num_classes: int) -> Any:
  """Opens a source, which must have this number of classes.

  Returns:
    As `open_source`.

  Raises:
    UserError: the number differs, or the images are missing.
  """
  source = open_source(data, split)
  if source.num_classes != num_classes:
    raise UserError(
      f"{data.name} has {source.num_classes} classes and the model"
      f" {num_classes}: set --config.task.num_classes={source.num_classes}"
    )
  return source
