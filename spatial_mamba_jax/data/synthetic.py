"""Images of noise, for measuring speed without a data set."""

import dataclasses
from typing import Any

import numpy as np

from spatial_mamba_jax.data.config import SPLITS, DataConfig


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
  """Noise images with labels 0, 1, ... in turn, reproducible by index."""

  num_images: int
  num_classes: int
  image_size: int
  split: str

  @property
  def classes(self) -> list[str]:
    """The labels as text."""
    return [str(label) for label in range(self.num_classes)]

  def __len__(self) -> int:
    return self.num_images

  def __getitem__(self, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([SPLITS.index(self.split), index])
    shape = (self.image_size, self.image_size, 3)
    # Pixels rather than a file, because decoding time of noise tells nothing.
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    return {"image": pixels, "label": index % self.num_classes}

  def name(self, index: int) -> str:
    """Returns the split and `index`, because there is no file."""
    return f"{self.split}[{index}]"


def open_split(config: DataConfig, split: str) -> SyntheticSource:
  """Opens a source with the config's number of images and classes."""
  return SyntheticSource(
    num_images=config.synthetic_images,
    num_classes=config.synthetic_classes,
    image_size=config.image_size,
    split=split,
  )
