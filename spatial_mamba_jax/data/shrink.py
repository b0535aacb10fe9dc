"""Makes smaller copies of large images, which decode faster."""

import collections
import io
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import TypeVar

from PIL import Image

from spatial_mamba_jax.data import decoding
from spatial_mamba_jax.data.config import DataConfig, DataError

T = TypeVar("T")

# Least pixels of a copy's shorter side: evaluation resizes the shorter side to
# this length, and must not enlarge a copy whose original was larger.
MIN_SIDE = int(DataConfig.image_size / DataConfig.test_crop_ratio)
# JPEG quality of copies, in libjpeg's scale, and their chroma subsampling. At
# quality 95, 4:2:0 makes larger copies that differ more from the original.
QUALITY = 90
SUBSAMPLING = "4:4:4"
# Images that each thread may be ahead of the writer.
_AHEAD = 4


def check_max_side(max_side: int) -> None:
  """Checks that copies are large enough for the recipe.

  Raises:
    DataError: they are not.
  """
  if max_side < MIN_SIDE:
    raise DataError(
      f"--max_side must be at least {MIN_SIDE}, got {max_side}: evaluation at"
      f" {DataConfig.image_size} pixels resizes the shorter side to {MIN_SIDE}"
    )


def describe(max_side: int) -> str:
  """Says what a copy is, for the data set's description."""
  return (
    f"Images whose longer side exceeds {max_side} pixels are resized (Lanczos)"
    f" to {max_side}, but to a shorter side of no less than {MIN_SIDE}, and"
    f" re-encoded as JPEG of quality {QUALITY} with {SUBSAMPLING} chroma."
  )


def shrink(encoded: bytes, max_side: int) -> bytes:
  """Returns a smaller copy of a large image; of others, the same bytes.

  The longer side becomes `max_side`. The shorter side of a thin image becomes
  `MIN_SIDE` instead. As in decoding, the EXIF orientation is not applied. The
  copy has no metadata.

  Args:
    encoded: an image file. One that cannot be decoded is returned unchanged.
    max_side: most pixels of the longer side.
  """
  try:
    old = decoding.image_size(encoded)
    new = _size(*old, max_side)
    if new == old:
      return encoded
    image = decoding.decode_image(encoded)
  except Exception:  # Decoders raise any type. Training reports the image.
    return encoded
  copy = io.BytesIO()
  image.resize(new, Image.Resampling.LANCZOS).save(
    copy, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING
  )
  return copy.getvalue()


def _size(width: int, height: int, max_side: int) -> tuple[int, int]:
  shorter, longer = sorted((width, height))
  scale = max(max_side / longer, MIN_SIDE / shorter)
  if scale >= 1:
    return width, height
  return round(width * scale), round(height * scale)


def map_in_order(function: Callable[[int], T], count: int) -> Iterator[T]:
  """Yields function(0) to function(count - 1), computed in a thread a core."""
  cores = os.cpu_count() or 1
  ahead: collections.deque[futures.Future[T]] = collections.deque()
  with futures.ThreadPoolExecutor(cores) as executor:
    for index in range(count):
      ahead.append(executor.submit(function, index))
      if len(ahead) > _AHEAD * cores:
        yield ahead.popleft().result()
    while ahead:
      yield ahead.popleft().result()
