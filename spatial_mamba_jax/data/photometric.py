"""Photometric distortion of training images, as in mmsegmentation 1.2.2.

Colours pass through OpenCV's 8-bit HSV: H counts half degrees, 0 to 179; S and
V are 0 to 255. The arithmetic is OpenCV's, so that the same draws give the same
pixels. Each step rounds to 8 bits.
"""

import dataclasses

import numpy as np

# Ranges of the drawn values.
_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE = 18
# Number of hues: half degrees in a circle.
_HUES = 180
# Fractional bits of the fixed-point divisions in `rgb_to_hsv`.
_BITS = 12


@dataclasses.dataclass(frozen=True)
class Distortion:
  """The drawn values; a step whose value is None is left out.

  Attributes:
    brightness: what is added to each channel.
    contrast: factor of each channel.
    saturation: factor of S.
    hue: what is added to H, in units of two degrees.
    contrast_first: whether contrast changes before saturation and hue.
  """

  brightness: float | None = None
  contrast: float | None = None
  saturation: float | None = None
  hue: int | None = None
  contrast_first: bool = False


def draw_distortion(rng: np.random.Generator, probability: float) -> Distortion:
  """Draws each step with this probability, and the order with 1/2."""
  brightness = _maybe_uniform(rng, probability, -_BRIGHTNESS, _BRIGHTNESS)
  contrast_first = bool(rng.integers(2))
  contrast = None
  if contrast_first:
    contrast = _maybe_uniform(rng, probability, *_FACTOR)
  saturation = _maybe_uniform(rng, probability, *_FACTOR)
  hue = None
  if rng.random() < probability:
    hue = int(rng.integers(-_HUE, _HUE))
  if not contrast_first:
    contrast = _maybe_uniform(rng, probability, *_FACTOR)
  return Distortion(brightness, contrast, saturation, hue, contrast_first)


def distort(image: np.ndarray, distortion: Distortion) -> np.ndarray:
  """Distorts an RGB image: uint8 [H, W, 3] to the same."""
  contrast = distortion.contrast
  if distortion.brightness is not None:
    image = _linear(offset=distortion.brightness).take(image)
  if contrast is not None and distortion.contrast_first:
    image = _linear(factor=contrast).take(image)
  if distortion.saturation is not None:
    hue, saturation, value = rgb_to_hsv(image)
    saturation = _linear(factor=distortion.saturation).take(saturation)
    image = hsv_to_rgb(hue, saturation, value)
  if distortion.hue is not None:
    # The second conversion is not merged with the first: each one rounds.
    hue, saturation, value = rgb_to_hsv(image)
    image = hsv_to_rgb((hue + distortion.hue) % _HUES, saturation, value)
  if contrast is not None and not distortion.contrast_first:
    image = _linear(factor=contrast).take(image)
  return image


def _maybe_uniform(
  rng: np.random.Generator, probability: float, low: float, high: float
) -> float | None:
  return float(rng.uniform(low, high)) if rng.random() < probability else None


def _linear(factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
  """Returns the table of a linear function, clipped and truncated."""
  values = np.arange(256, dtype=np.float32)
  values = values * np.float32(factor) + np.float32(offset)
  return values.clip(0, 255).astype(np.uint8)


def rgb_to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the integers H, S and V, each [H, W], of uint8 [H, W, 3]."""
  red, green, blue = (image[..., i].astype(np.int32) for i in range(3))
  value = np.maximum(np.maximum(red, green), blue)
  spread = value - np.minimum(np.minimum(red, green), blue)
  half = 1 << (_BITS - 1)
  saturation = (spread * _reciprocals(255).take(value) + half) >> _BITS
  sixth = np.where(
    value == red,
    green - blue,
    np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
  )
  hue = (sixth * _reciprocals(_HUES // 6).take(spread) + half) >> _BITS
  hue[hue < 0] += _HUES
  return hue, saturation, value.astype(np.uint8)


def _reciprocals(numerator: int) -> np.ndarray:
  """Returns `numerator / i` for i < 256 in fixed point, and 0 for i = 0."""
  denominator = np.arange(256)
  quotient = (numerator << _BITS) / np.maximum(denominator, 1)
  return np.where(denominator, np.rint(quotient), 0).astype(np.int32)


def hsv_to_rgb(
  hue: np.ndarray, saturation: np.ndarray, value: np.ndarray
) -> np.ndarray:
  """Returns uint8 [H, W, 3] of the integers H, S and V, each [H, W]."""
  position = hue.astype(np.float32) * np.float32(6 / _HUES)
  s, v = (
    x.astype(np.float32) * np.float32(1 / 255) for x in (saturation, value)
  )
  sector = position.astype(int)
  fraction = position - sector.astype(np.float32)
  # OpenCV truncates whole vectors of pixels, 32 with AVX2, but rounds in the
  # rest of a row. Here all are truncated.
  levels = [
    (255 * level).astype(np.uint8)
    for level in (
      v,
      v * (1 - s),
      v * _one_minus(s, fraction),
      v * _one_minus(s, 1 - fraction),
    )
  ]
  # The level of each channel, by sector.
  order = ((0, 2, 1, 1, 3, 0), (3, 0, 0, 2, 1, 1), (1, 1, 3, 0, 0, 2))
  channels = [np.choose(sector, [levels[i] for i in each]) for each in order]
  return np.stack(channels, -1)


def _one_minus(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Returns 1 - a * b with one rounding to float32.

  OpenCV compiles it to a fused multiply-add. Rounding the product too would
  change a pixel in some thousands.
  """
  return (1 - a.astype(np.float64) * b).astype(np.float32)
