"""OpenCV's resizing of 8-bit images and of label maps, in NumPy.

The arithmetic is that of `cv2.resize`, so that mmsegmentation's pipeline has
the same pixels: bilinear in fixed point and without antialiasing for images,
nearest for labels. A window of the resized image is computed without the rest.
"""

from typing import NamedTuple

import numpy as np

# Fractional bits of the weights.
_BITS = 11
# Bits dropped after the horizontal pass, after the vertical one, and at last.
_DROPPED = (4, 16, 2)


class Window(NamedTuple):
  """A part of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


def rescaled_size(
  size: tuple[int, int], box: tuple[int, int]
) -> tuple[int, int]:
  """Returns the size of an image that is resized into a box.

  The aspect ratio is kept, and the longer side of the image lies along the
  longer one of the box, as in mmcv 2.1.0.

  Args:
    size: height and width of the image, in pixels.
    box: the sides of the box in pixels, in any order.

  Returns:
    Height and width, each at least 1.
  """
  factor = min(max(box) / max(size), min(box) / min(size))
  height, width = (max(1, int(side * factor + 0.5)) for side in size)
  return height, width


def resize_image(
  pixels: np.ndarray, size: tuple[int, int], window: Window | None = None
) -> np.ndarray:
  """Resizes an image bilinearly.

  Args:
    pixels: uint8 [H, W, C].
    size: the new height and width, in pixels.
    window: the part of the resized image to compute; None for all of it.

  Returns:
    uint8 [window.height, window.width, C].
  """
  window = window or Window(0, 0, *size)
  height, width = pixels.shape[:2]
  columns = _taps(width, size[1], window.left, window.width)
  rows = _taps(height, size[0], window.top, window.height)
  # OpenCV gives a column beyond the border the weights of the border, but a row
  # its own weights. The two differ in rounding.
  outside = (columns.first < 0) | (columns.first >= width - 1)
  columns.weights[:, outside] = [[1 << _BITS], [0]]
  top, bottom = _covered(rows, height)
  left, right = _covered(columns, width)
  part = pixels[top:bottom, left:right]
  first, second = _clamped(columns, left, right)
  across = part.take(first, 1) * columns.weights[0][:, None]
  across += part.take(second, 1) * columns.weights[1][:, None]
  across >>= _DROPPED[0]
  first, second = _clamped(rows, top, bottom)
  total = (across[first] * rows.weights[0][:, None, None]) >> _DROPPED[1]
  total += (across[second] * rows.weights[1][:, None, None]) >> _DROPPED[1]
  total += 1 << (_DROPPED[2] - 1)
  total >>= _DROPPED[2]
  return total.astype(np.uint8)


def resize_labels(
  labels: np.ndarray, size: tuple[int, int], window: Window | None = None
) -> np.ndarray:
  """Resizes a label map; each new pixel takes the label of one old pixel.

  Args:
    labels: any type, [H, W].
    size: the new height and width, in pixels.
    window: the part of the resized map to compute; None for all of it.

  Returns:
    The same type, [window.height, window.width].
  """
  window = window or Window(0, 0, *size)
  rows = _nearest(labels.shape[0], size[0], window.top, window.height)
  columns = _nearest(labels.shape[1], size[1], window.left, window.width)
  return labels[rows[:, None], columns]


class _Taps(NamedTuple):
  """The two old pixels of each new pixel along an axis.

  Attributes:
    first: the index of the first, which may be -1; the second is the next.
    weights: int32 [2, size], of both, times 2**_BITS.
  """

  first: np.ndarray
  weights: np.ndarray


def _taps(old: int, new: int, start: int, size: int) -> _Taps:
  """Returns the bilinear taps of `size` new pixels from `start` on."""
  index = np.arange(start, start + size) + 0.5
  centre = (index * _scale(old, new) - 0.5).astype(np.float32)
  first = np.floor(centre)
  weight = centre - first
  weights = np.stack([1 - weight, weight]) * np.float32(1 << _BITS)
  return _Taps(first.astype(int), np.rint(weights).astype(np.int32))


def _covered(taps: _Taps, old: int) -> tuple[int, int]:
  """Returns the range of the old pixels that have a weight."""
  first = max(int(taps.first.min()), 0)
  return first, min(int(taps.first.max()) + 2, old)


def _clamped(
  taps: _Taps, start: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the indices of both pixels within the range from start to end."""
  first = taps.first - start
  last = end - start - 1
  return first.clip(0, last), (first + 1).clip(0, last)


def _nearest(old: int, new: int, start: int, size: int) -> np.ndarray:
  """Returns the old pixel of each of `size` new pixels from `start` on."""
  index = np.floor(np.arange(start, start + size) * _scale(old, new))
  return np.minimum(index.astype(int), old - 1)


def _scale(old: int, new: int) -> float:
  # Not old / new: OpenCV rounds twice.
  return 1 / (new / old)
