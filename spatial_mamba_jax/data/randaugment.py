"""RandAugment (arXiv 1909.13719) with the operations of the authors' recipe.

The operations are those of timm 0.4.12 for `rand-m9-mstd0.5-inc1`: magnitudes
are from 0 to 10, and a larger one always distorts more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from spatial_mamba_jax.data.config import MAX_MAGNITUDE, DataConfig

# Probability of applying an operation that was drawn.
_PROBABILITY = 0.5
# Colour of pixels from outside of the image: ImageNet's mean.
_FILL = (124, 116, 104)
_AFFINE = Image.Transform.AFFINE
_BICUBIC = Image.Resampling.BICUBIC


class Operation(NamedTuple):
  """One way to distort an image.

  Attributes:
    argument: (magnitude, sign) -> the argument of `apply`; the sign is 1 or -1.
    apply: (image, argument) -> an image of the same size.
  """

  argument: Callable[[float, int], float]
  apply: Callable[[Image.Image, float], Image.Image]


def randaugment(
  image: Image.Image, config: DataConfig, rng: np.random.Generator
) -> Image.Image:
  """Applies operations drawn at random, with replacement.

  Args:
    image: an RGB image.
    config: has the number of operations, and the mean and standard deviation of
      their magnitude.
    rng: random generator.
  """
  operations = tuple(OPERATIONS.values())
  for index in rng.integers(
    len(operations), size=config.randaugment_operations
  ):
    if rng.random() >= _PROBABILITY:
      continue
    drawn = rng.normal(config.randaugment_magnitude, config.randaugment_std)
    magnitude = min(max(drawn, 0.0), MAX_MAGNITUDE)
    sign = 1 if rng.random() < 0.5 else -1
    operation = operations[index]
    image = operation.apply(image, operation.argument(magnitude, sign))
  return image


def _no_argument(magnitude: float, sign: int) -> float:
  del magnitude, sign
  return 0.0


def _signed(largest: float) -> Callable[[float, int], float]:
  return lambda magnitude, sign: sign * largest * magnitude / MAX_MAGNITUDE


def _enhancement(magnitude: float, sign: int) -> float:
  return 1 + sign * 0.9 * magnitude / MAX_MAGNITUDE


def _bits_kept(magnitude: float, sign: int) -> float:
  del sign
  return 4.0 - int(4 * magnitude / MAX_MAGNITUDE)


def _threshold(magnitude: float, sign: int) -> float:
  del sign
  return 256.0 - int(256 * magnitude / MAX_MAGNITUDE)


def _added(magnitude: float, sign: int) -> float:
  del sign
  return float(int(110 * magnitude / MAX_MAGNITUDE))


def _posterize(image: Image.Image, bits: float) -> Image.Image:
  # Not ImageOps.posterize: Pillow 13 refuses 0 bits, older versions give black.
  mask = -(1 << (8 - int(bits)))
  table = [value & mask for value in range(256)]
  return image.point(table * len(image.getbands()))


def _solarize_add(image: Image.Image, added: float) -> Image.Image:
  table = [
    min(255, value + int(added)) if value < 128 else value
    for value in range(256)
  ]
  return image.point(table * len(image.getbands()))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
  return image.rotate(degrees, _BICUBIC, fillcolor=_FILL)


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
  """Moves the pixel at (a x + b y + c, d x + e y + f) to (x, y)."""
  return image.transform(image.size, _AFFINE, matrix, _BICUBIC, fillcolor=_FILL)


def _enhance(
  image: Image.Image, factor: float, *, enhancer: Callable[[Image.Image], Any]
) -> Image.Image:
  return enhancer(image).enhance(factor)


OPERATIONS: dict[str, Operation] = {
  "AutoContrast": Operation(
    _no_argument, lambda image, _: ImageOps.autocontrast(image)
  ),
  "Equalize": Operation(
    _no_argument, lambda image, _: ImageOps.equalize(image)
  ),
  "Invert": Operation(_no_argument, lambda image, _: ImageOps.invert(image)),
  "Rotate": Operation(_signed(30.0), _rotate),
  "PosterizeIncreasing": Operation(_bits_kept, _posterize),
  "SolarizeIncreasing": Operation(
    _threshold, lambda image, at: ImageOps.solarize(image, int(at))
  ),
  "SolarizeAdd": Operation(_added, _solarize_add),
  **{
    f"{name}Increasing": Operation(
      _enhancement, partial(_enhance, enhancer=getattr(ImageEnhance, name))
    )
    for name in ("Color", "Contrast", "Brightness", "Sharpness")
  },
  "ShearX": Operation(
    _signed(0.3), lambda image, s: _affine(image, (1.0, s, 0.0, 0.0, 1.0, 0.0))
  ),
  "ShearY": Operation(
    _signed(0.3), lambda image, s: _affine(image, (1.0, 0.0, 0.0, s, 1.0, 0.0))
  ),
  "TranslateXRel": Operation(
    _signed(0.45),
    lambda image, t: _affine(image, (1.0, 0.0, t * image.width, 0.0, 1.0, 0.0)),
  ),
  "TranslateYRel": Operation(
    _signed(0.45),
    lambda image, t: _affine(
      image, (1.0, 0.0, 0.0, 0.0, 1.0, t * image.height)
    ),
  ),
}
