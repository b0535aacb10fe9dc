"""The interface of image sources, and opening one by its config."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spatial_mamba_jax.data.config import (
  LABEL_MAPS,
  SPLITS,
  DataConfig,
  DataError,
)
from spatial_mamba_jax.errors import one_line

__all__ = [
  "LABEL_MAPS",
  "LabelledSource",
  "SegmentedSource",
  "Source",
  "open_source",
]


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


@runtime_checkable
class SegmentedSource(Source, Protocol):
  """Images with a label map each.

  A record has

  - "image": an encoded image file (bytes) or its pixels, uint8 [H, W, 3];
  - "labels": an encoded image file of one index a pixel (bytes), or integers
    [H, W]. H and W are those of the image in its EXIF orientation;
  - "offset": an int, which is subtracted from the stored values;
  - "ignored": the stored value of pixels without a class.
  """

  @property
  def num_classes(self) -> int:
    """The number of classes."""
    ...

  @property
  def classes(self) -> Sequence[str]:
    """The class names, by label."""
    ...

  @property
  def palette(self) -> np.ndarray:
    """A colour for each class, for drawing: uint8 [num_classes, 3]."""
    ...

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns the height and width of image `index` in pixels.

    They are those of the image in its EXIF orientation. Only the header is
    read, and an exception is raised if it cannot be read.
    """
    ...


def open_source(
  config: DataConfig, split: str
) -> LabelledSource | SegmentedSource:
  """Opens one split of the configured data set.

  `digits` is prepared on first use; the others must already be there.

  Args:
    config: the config of the pipeline.
    split: "train" or "validation".

  Returns:
    The images, read lazily; a `SegmentedSource` if the name is in `LABEL_MAPS`.

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
    case "ade20k":
      from spatial_mamba_jax.data import ade20k as module
    case "segmentation_folder":
      from spatial_mamba_jax.data import segmentation_folder as module
    case "digit_scenes":
      from spatial_mamba_jax.data import digit_scenes as module
    case _:
      from spatial_mamba_jax.data import synthetic as module
  try:
    return module.open_split(config, split)
  except OSError as error:
    raise DataError(f"cannot open {config.name}: {one_line(error)}") from error
