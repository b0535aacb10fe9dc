"""The interface of image sources, and opening one by its config."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from spatial_mamba_jax.data.config import SPLITS, DataConfig, DataError
from spatial_mamba_jax.errors import one_line


@runtime_checkable
class Source(Protocol):
  """The records of one split, in a fixed order.

  `source[i]` is a mapping that `Examples.read` decodes. It raises an exception
  if the record cannot be read. Worker processes receive a pickled copy.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, Any]: ...

  def name(self, index: int) -> str:
    """Returns a name of record `index` for messages, mostly a file name."""
    ...


@runtime_checkable
class LabelledSource(Source, Protocol):
  """Images with one label each.

  A record has "image", an encoded image file (bytes) or its pixels (uint8
  [H, W, 3]), and "label", an int below `num_classes`.
  """

  @property
  def num_classes(self) -> int:
    """The number of classes, with or without images."""
    ...

  @property
  def classes(self) -> Sequence[str]:
    """The class names by label; without names, the labels as text."""
    ...


def open_source(config: DataConfig, split: str) -> LabelledSource:
  """Opens one split of the configured data set.

  `digits` is prepared on first use; the others must already be there.

  Args:
    config: the config of the pipeline.
    split: "train" or "validation".

  Returns:
    The images, read lazily.

  Raises:
    DataError: the config is wrong, or the data set is missing or malformed.
  """
  config.validate()
  if split not in SPLITS:
    raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
  # Imported where needed: each source has its own dependencies.
  match config.name:
    case "digits":
      from spatial_mamba_jax.data import digits as module
    case "imagenet2012":
      from spatial_mamba_jax.data import imagenet as module
    case "image_folder":
      from spatial_mamba_jax.data import image_folder as module
    case _:
      from spatial_mamba_jax.data import synthetic as module
  try:
    return module.open_split(config, split)
  except OSError as error:
    raise DataError(f"cannot open {config.name}: {one_line(error)}") from error
