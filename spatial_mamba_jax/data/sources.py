"""One interface over every place that images come from."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from spatial_mamba_jax.data.config import SPLITS, DataConfig, DataError
from spatial_mamba_jax.errors import one_line


@runtime_checkable
class Source(Protocol):
  """The records of one split, in a fixed order.

  `source[i]` is a mapping, of which `Examples.read` makes sense. It raises an
  exception where the record cannot be read. Worker processes receive a pickled
  copy.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, Any]: ...

  def name(self, index: int) -> str:
    """What a person would call record `index`: a file name, mostly."""
    ...


@runtime_checkable
class LabelledSource(Source, Protocol):
  """Images with one label each.

  Its records have "image", an encoded image file (bytes) or its pixels (uint8
  [H, W, 3]), and "label", an int below `num_classes`.
  """

  @property
  def num_classes(self) -> int:
    """How many classes there are, with or without images."""
    ...

  @property
  def classes(self) -> Sequence[str]:
    """The classes' names by label; numbers where they have no others."""
    ...


def open_source(config: DataConfig, split: str) -> LabelledSource:
  """Opens one split of the configured data set.

  `digits` is prepared on first use; the others must already be there.

  Args:
    config: the data settings.
    split: "train" or "validation".

  Returns:
    The images, read lazily.

  Raises:
    DataError: if a setting is wrong, or the data set is missing or malformed.
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
