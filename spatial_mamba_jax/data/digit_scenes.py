"""Scenes of handwritten digits, to try semantic segmentation without a download.

A scene has a few of scikit-learn's digits, enlarged and coloured, on textured
ground. A digit may cover a part of another.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from spatial_mamba_jax.data.config import SPLITS, DataConfig
from spatial_mamba_jax.data.digit_images import load_digits, split_indices
from spatial_mamba_jax.data.label_maps import make_palette

_CLASSES = ("ground", *"0123456789")
_NUM_SCENES = {"train": 600, "validation": 100}
# Heights and widths of a split's scenes, in turn.
_SIZES = {
  "train": ((96, 96),),
  "validation": ((96, 96), (96, 128), (112, 96)),
}
# Least and greatest number of digits in a scene, and side of a digit's square
# in pixels.
_COUNT = (3, 5)
_SIDE = (32, 56)
# Ink from which on a pixel belongs to a digit, and half the width of a stroke's
# soft edge, in ink.
_THRESHOLD = 0.4
_EDGE = 0.12
# Side of the patches of the ground's coarse texture in pixels, and standard
# deviations of the coarse and of the fine texture.
_PATCH = 16
_COARSE, _FINE = 14.0, 5.0
# Least difference between the brightness of a digit and of the ground.
_CONTRAST = 80.0
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
    ground = rng.uniform(40, 215, 3)
    image = ground + _texture(height, width, rng)
    labels = np.zeros((height, width), np.uint8)
    choices = split_indices(self.split)
    for _ in range(rng.integers(*_COUNT, endpoint=True)):
      _draw_digit(image, labels, int(rng.choice(choices)), ground, rng)
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


def _texture(
  height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
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
  ground: np.ndarray,
  rng: np.random.Generator,
) -> None:
  """Draws a digit at a random position and size, in place."""
  digits = load_digits()
  height, width = (
    int(rng.integers(*_SIDE, endpoint=True)) for _ in range(2)
  )
  # Sides of one digit are similar.
  width = (height + width) // 2
  top = int(rng.integers(image.shape[0] - height + 1))
  left = int(rng.integers(image.shape[1] - width + 1))
  here = slice(top, top + height), slice(left, left + width)
  ink = _enlarge(digits.ink[digit], height, width)
  cover = ((ink - _THRESHOLD + _EDGE) / (2 * _EDGE)).clip(0, 1)[..., None]
  image[here] += cover * (_contrasting(ground, rng) - image[here])
  labels[here][ink >= _THRESHOLD] = digits.labels[digit] + 1


def _contrasting(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Returns a random colour much brighter or darker than the ground."""
  while True:
    colour = rng.uniform(0, 255, 3)
    if abs(colour.mean() - ground.mean()) >= _CONTRAST:
      return colour


def _enlarge(values: np.ndarray, height: int, width: int) -> np.ndarray:
  image = Image.fromarray(values.astype(np.float32))
  resized = image.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(resized, np.float64)
