"""Turns images into the pixels of a batch, as in the authors' recipe.

The recipe uses timm 0.4.12 and torchvision, which call Pillow. This module
calls Pillow too, so that the same file gives the same pixels. All randomness
comes from the generator that is passed in.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.decoding import check_size, decode_image
from spatial_mamba_jax.data.randaugment import randaugment
from spatial_mamba_jax.preprocessing import Preprocessing

__all__ = [
  "decode_image",
  "random_resized_crop",
  "sample_crop",
  "transform_for_evaluation",
  "transform_for_training",
]

_CROP_ATTEMPTS = 10
# Most pixels of an enlarged image that Pillow computes whole, although only the
# centre is used.
_WHOLE_PIXELS = 2**24
# Fractional bits of the fixed-point weights with which Pillow resizes.
_WEIGHT_BITS = 22


def transform_for_training(
  image: Image.Image, config: DataConfig, rng: np.random.Generator
) -> np.ndarray:
  """Crops, mirrors and distorts: uint8 [image_size, image_size, 3].

  The recipe's other augmentation is applied to batches, on the device.
  """
  image = random_resized_crop(image, config, rng)
  if rng.random() < config.flip_probability:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(randaugment(image, config, rng))


def transform_for_evaluation(
  image: Image.Image, preprocessing: Preprocessing
) -> np.ndarray:
  """Resizes, and crops the centre: uint8 [image_size, image_size, 3].

  It computes the same as torchvision's `Resize` and `CenterCrop`.
  """
  size, short = preprocessing.image_size, preprocessing.short_side
  width, height = image.size
  if width <= height:
    width, height = short, int(short * height / width)
  else:
    width, height = int(short * width / height), short
  left, top = round((width - size) / 2), round((height - size) / 2)
  # The whole of a very thin image, enlarged, may not fit into memory.
  if width * height > max(_WHOLE_PIXELS, image.width * image.height):
    columns = _enlarge(image.width, width, left, size)
    rows = _enlarge(image.height, height, top, size)
    return _resample(image, columns, rows)
  image = _resize(image, (width, height))
  return np.asarray(image.crop((left, top, left + size, top + size)))


class _Taps(NamedTuple):
  """The taps of each new pixel along an axis.

  Attributes:
    pixel: [size, 5], indices of old pixels.
    weight: [size, 5], their weights, times 2**_WEIGHT_BITS.
  """

  pixel: np.ndarray
  weight: np.ndarray


def _enlarge(old: int, new: int, first: int, size: int) -> _Taps:
  """Returns the bicubic taps of a range of new pixels along an axis.

  They equal Pillow's (`precompute_coeffs` in its Resample.c).

  Args:
    old: number of old pixels along the axis.
    new: number of new pixels, no fewer.
    first: index of the range's first new pixel.
    size: number of new pixels in the range.
  """
  centre = (np.arange(first, first + size)[:, None] + 0.5) * (old / new)
  start = np.maximum((centre - 2 + 0.5).astype(int), 0)
  end = np.minimum((centre + 2 + 0.5).astype(int), old)
  index = start + np.arange(5)
  x = np.abs(index - centre + 0.5)
  weight = np.where(
    x < 1, (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
  )
  weight = np.where((x < 2) & (index < end), weight, 0.0)
  # `accumulate` adds in the order of Pillow.
  weight /= np.add.accumulate(weight, axis=1)[:, -1:]
  scaled = weight * (1 << _WEIGHT_BITS)
  rounded = (scaled + np.copysign(0.5, scaled)).astype(int)
  return _Taps(np.minimum(index, old - 1), rounded)


def _resample(image: Image.Image, columns: _Taps, rows: _Taps) -> np.ndarray:
  """Computes a part of the image that Pillow would enlarge: uint8 [H, W, 3]."""
  left, right = int(columns.pixel.min()), int(columns.pixel.max()) + 1
  top, bottom = int(rows.pixel.min()), int(rows.pixel.max()) + 1
  pixels = np.asarray(image.crop((left, top, right, bottom)))
  # Columns first, and rounded in between, as in Pillow.
  pixels = _weigh(pixels, columns.pixel - left, columns.weight)
  transposed = _weigh(pixels.swapaxes(0, 1), rows.pixel - top, rows.weight)
  return transposed.swapaxes(0, 1)


def _weigh(
  pixels: np.ndarray, index: np.ndarray, weight: np.ndarray
) -> np.ndarray:
  """Applies taps along the second axis: uint8 [A, B, 3] to [A, size, 3]."""
  half = 1 << (_WEIGHT_BITS - 1)
  total = np.full((len(pixels), len(index), 3), half, np.int64)
  for tap in range(index.shape[1]):
    total += pixels[:, index[:, tap]] * weight[:, tap, None]
  return (total >> _WEIGHT_BITS).clip(0, 255).astype(np.uint8)


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  check_size(size[0], max(image.height, size[1]))
  # The width first, as the recipe's Pillow does. From version 13 on, a single
  # call begins with the height of tall images, and rounds differently.
  for each in ((size[0], image.height), size):
    image = image.resize(each, Image.Resampling.BICUBIC)
  return image


def random_resized_crop(
  image: Image.Image, config: DataConfig, rng: np.random.Generator
) -> Image.Image:
  """Crops at random, and resizes to a square of `image_size` pixels."""
  box = sample_crop(
    *image.size, scale=config.crop_scale, ratio=config.crop_ratio, rng=rng
  )
  # Not resize(box=...): that would let pixels outside the crop bleed in.
  return _resize(image.crop(box), (config.image_size, config.image_size))


def sample_crop(
  width: int,
  height: int,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draws a crop (timm 0.4.12, `RandomResizedCropAndInterpolation`).

  Args:
    width: width of the image, in pixels.
    height: height of the image, in pixels.
    scale: range of the crop's area as a share of the image's; uniform.
    ratio: range of the crop's width / height; log-uniform.
    rng: random generator.

  Returns:
    left, top, right and bottom in pixels. If no draw fits into the image, they
    are those of the largest central crop whose aspect ratio is in range.
  """
  for _ in range(_CROP_ATTEMPTS):
    area = rng.uniform(*scale) * width * height
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      left = int(rng.integers(width - crop_width + 1))
      top = int(rng.integers(height - crop_height + 1))
      return left, top, left + crop_width, top + crop_height
  crop_width, crop_height = width, height
  if width / height < ratio[0]:
    crop_height = max(1, round(width / ratio[0]))
  elif width / height > ratio[1]:
    crop_width = max(1, round(height * ratio[1]))
  left, top = (width - crop_width) // 2, (height - crop_height) // 2
  return left, top, left + crop_width, top + crop_height
