"""Label maps: a class for each pixel, stored as an image of indices."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spatial_mamba_jax.data.decoding import check_size, open_image
from spatial_mamba_jax.data.examples import WrongRecordError
from spatial_mamba_jax.errors import one_line

# The label of pixels without a class.
IGNORED = -1

# Pillow's modes of images with one integer a pixel, of at most 16 bits. PNG
# files of 16 bits have the mode "I" before Pillow 11.
_MODES = frozenset({"1", "L", "P", "I;16", "I"})
# Positions in a PNG file of the bits of a channel and of the colour type, and
# the colour type of grey images.
_DEPTH, _COLOUR, _GREY = 24, 25, 0
# Step, modulo 1, of each channel from one colour to the next: powers of the
# root of x**4 = x + 1. Such a sequence fills a cube evenly, however long it is.
_STEPS = 1.2207440846057596 ** -np.arange(1.0, 4.0)
# Least value of a colour's channels.
_DARKEST = 32


def read_label_map(
  record: Mapping[str, Any], num_classes: int, size: tuple[int, int]
) -> np.ndarray:
  """Decodes the label map of a `SegmentedSource`'s record.

  Args:
    record: the record.
    num_classes: labels are integers below it, or `IGNORED`.
    size: height and width of the image, in pixels.

  Returns:
    int16 [H, W].

  Raises:
    WrongRecordError: the label map has another size than the image, a value
      that is no class, or not one index a pixel.
    ValueError: the file is broken.
  """
  with of_label_map():
    stored = _stored_values(record["labels"])
  if stored.shape != size:
    raise WrongRecordError(
      f"its label map has {stored.shape[1]} x {stored.shape[0]} pixels and the"
      f" image, upright, {size[1]} x {size[0]}: save the label map in the size"
      " of the image"
    )
  ignored = stored == record["ignored"]
  labels = stored.astype(np.int32) - record["offset"]
  wrong = ((labels < 0) | (labels >= num_classes)) & ~ignored
  if wrong.any():
    raise WrongRecordError(_wrong_values(stored[wrong], record, num_classes))
  labels[ignored] = IGNORED
  return labels.astype(np.int16)


@contextlib.contextmanager
def of_label_map() -> Iterator[None]:
  """Says that an error is of the label map, because messages name the image."""
  try:
    yield
  except WrongRecordError:
    raise
  except Exception as error:  # Decoders raise nearly any exception.
    reason = error.strerror if isinstance(error, OSError) else None
    raise ValueError(
      f"its label map cannot be read: {reason or one_line(error)}"
    ) from error


def make_palette(num_classes: int) -> np.ndarray:
  """Returns a colour for each class: uint8 [num_classes, 3], all distinct."""
  position = (0.5 + np.arange(num_classes)[:, None] * _STEPS) % 1
  return (_DARKEST + position * (256 - _DARKEST)).astype(np.uint8)


def _stored_values(encoded: Any) -> np.ndarray:
  """Returns the integers in a label map's file: [H, W]."""
  if isinstance(encoded, np.ndarray):
    if encoded.ndim != 2 or encoded.dtype.kind not in "iu":
      raise WrongRecordError(
        f"its label map must be integers [H, W], got {encoded.dtype}"
        f" {encoded.shape}"
      )
    return encoded
  image = open_image(encoded)
  if image.format != "PNG":
    raise WrongRecordError(
      f"its label map is a {image.format} file: save it as PNG, which keeps"
      " every index"
    )
  if image.mode not in _MODES:
    raise WrongRecordError(
      f"its label map has the mode {image.mode}: save it as grey or palette"
      " PNG, with one index a pixel"
    )
  check_size(*image.size)
  values = np.asarray(image)
  if encoded[_COLOUR] == _GREY and encoded[_DEPTH] in (2, 4):
    # Pillow spreads them over 0 to 255.
    return values // (255 // (2 ** encoded[_DEPTH] - 1))
  return values.astype(np.uint8) if values.dtype == bool else values


def _wrong_values(
  stored: np.ndarray, record: Mapping[str, Any], num_classes: int
) -> str:
  values, counts = np.unique(stored, return_counts=True)
  others = f" and {len(values) - 1} more such values" if len(values) > 1 else ""
  first = record["offset"]
  return (
    f"its label map has the value {values[0]} in {counts[0]} pixels{others}:"
    f" {num_classes} classes have the values {first} to"
    f" {first + num_classes - 1}, and pixels without a class have"
    f" {record['ignored']}"
  )
