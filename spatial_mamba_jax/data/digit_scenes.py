"""Scenes of handwritten digits, for semantic segmentation without a download.

A scene has a few of scikit-learn's digits, enlarged and brightly coloured, on
darker textured ground. A digit may cover a small part of others.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from spatial_mamba_jax.data.config import SPLITS, DataConfig
from spatial_mamba_jax.data.digit_images import load_digits, split_indices
from spatial_mamba_jax.data.label_maps import make_palette

_CLASSES = ("ground", *"0123456789")
_NUM_SCENES = {"train": 12_000, "validation": 100}
# Heights and widths of a split's scenes, in turn.
_SIZES = {
  "train": ((48, 48),),
  "validation": ((48, 48), (48, 64)),
}
# Least and greatest number of digits to draw, and range of a digit's height in
# pixels and of its width / height.
_COUNT = (1, 2)
_HEIGHT = (34, 44)
_ASPECT = (0.75, 1.0)
# Most draws of a digit's position, and greatest share of its pixels that may
# cover other digits.
_DRAWS = 10
_MAX_COVER = 0.02
# Ink from which on a pixel belongs to a digit, and range of ink of a stroke's
# soft edge.
_THRESHOLD = 0.4
_EDGE = 0.24
# Side of the patches of the ground's coarse texture in pixels, and standard
# deviations of the coarse and of the fine texture.
_PATCH = 16
_COARSE, _FINE = 14.0, 5.0
# Ranges of the colours of the ground and of digits.
_GROUND, _INK = (10, 80), (160, 255)
# A stored value that no pixel has.
_IGNORED = 255


@dataclasses.dataclass(frozen=True)
class DigitScenes:
  """Scenes of one split, reproducible by index.

  Each split has its own digits. It implements `SegmentedSource`.
  """

  split: str

  @property
  def num_classes(self) -> int:
    """The ground and ten digits."""
    return len(_CLASSES)

  @property
  def classes(self) -> tuple[str, ...]:
    """The class names, by label."""
    return _CLASSES

  @property
  def palette(self) -> np.ndarray:
    """A colour for each class: uint8 [11, 3]."""
    return make_palette(len(_CLASSES))

  def __len__(self) -> int:
    return _NUM_SCENES[self.split]

  def __getitem__(self, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([SPLITS.index(self.split), index])
    height, width = self.image_size(index)
    ground = rng.uniform(*_GROUND, 3)
    image = ground + _texture(height, width, rng)
    labels = np.zeros((height, width), np.uint8)
    digits = rng.choice(
      split_indices(self.split), rng.integers(*_COUNT, endpoint=True)
    )
    for digit in digits:
      _draw_digit(image, labels, int(digit), rng.uniform(*_INK, 3), rng)
    image += rng.normal(0, _FINE, image.shape)
    return {
      "image": np.rint(image).clip(0, 255).astype(np.uint8),
      "labels": labels,
      "offset": 0,
      "ignored": _IGNORED,
    }

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns height and width of scene `index`, in pixels."""
    sizes = _SIZES[self.split]
    return sizes[index % len(sizes)]

  def name(self, index: int) -> str:
    """Returns the split and `index`, because there is no file."""
    return f"{self.split}[{index}]"


def open_split(config: DataConfig, split: str) -> DigitScenes:
  """Opens one split."""
  del config  # Scenes have no settings.
  return DigitScenes(split)


def _texture(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
  """Returns smooth noise of mean 0: [H, W, 3]."""
  shape = height // _PATCH + 2, width // _PATCH + 2
  channels = [
    _enlarge(rng.normal(0, _COARSE, shape), height, width) for _ in range(3)
  ]
  return np.stack(channels, -1)


def _draw_digit(
  image: np.ndarray,
  labels: np.ndarray,
  digit: int,
  colour: np.ndarray,
  rng: np.random.Generator,
) -> None:
  """Draws a digit in random size and position, in place.

  A digit for which no position is found is left out.
  """
  digits = load_digits()
  height = int(rng.integers(*_HEIGHT, endpoint=True))
  width = round(height * rng.uniform(*_ASPECT))
  ink = _enlarge(digits.ink[digit], height, width)
  shape = ink >= _THRESHOLD
  for _ in range(_DRAWS):
    top = int(rng.integers(labels.shape[0] - height + 1))
    left = int(rng.integers(labels.shape[1] - width + 1))
    here = slice(top, top + height), slice(left, left + width)
    if np.mean(labels[here][shape] > 0) <= _MAX_COVER:
      cover = ((ink - _THRESHOLD) / _EDGE + 0.5).clip(0, 1)[..., None]
      image[here] += cover * (colour - image[here])
      labels[here][shape] = digits.labels[digit] + 1
      return


def _enlarge(values: np.ndarray, height: int, width: int) -> np.ndarray:
  image = Image.fromarray(values.astype(np.float32))
  resized = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(resized, np.float64)
