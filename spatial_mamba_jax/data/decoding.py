"""From the bytes of an image file to RGB, within a stated memory."""

import functools
import io
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Bytes that an image may take: its file, its decoded pixels and what these are
# resized to, each by itself. What would take more is unreadable. Pillow itself
# refuses more than 178,956,970 pixels.
MAX_BYTES = 2**30
# Bytes of a pixel and of a row in Pillow, and of a pixel of 32 bits while it is
# scaled.
_PIXEL, _ROW, _SCALED = 4, 8, 16

# Pillow's formats that are read -> suffixes of their files, in lower case.
# Without this list a broken file would be tried on every plugin of Pillow, some
# of which start other programs. TGA is left out, because it has no signature:
# garbage can pass for it.
FORMATS: dict[str, tuple[str, ...]] = {
  "AVIF": (".avif",),
  "BMP": (".bmp", ".dib"),
  "GIF": (".gif",),
  "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
  "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
  "PNG": (".apng", ".png"),
  "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"),
  "TIFF": (".tif", ".tiff"),
  "WEBP": (".webp",),
}
_JPEG = b"\xff\xd8\xff"
# Numbers of TIFF's tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


def decode_image(encoded: Any, decoder: str = "pillow") -> Image.Image:
  """Decodes an image file to RGB.

  Transparency is dropped and the EXIF orientation is not applied, as in the
  recipe's loader. Of several frames the first is taken. Of 16-bit grey values
  the high byte is kept; floats, 32-bit and signed integers are scaled linearly,
  so that the image's least finite value becomes black and its greatest white.

  Args:
    encoded: the file's bytes; or pixels, uint8 [H, W, 3], which only change
      their type.
    decoder: of JPEG files in RGB or grey; all else is Pillow's, and so is what
      simplejpeg refuses.

  Raises:
    Exception: whatever the decoder makes of a broken file; TypeError for what
      is neither bytes nor an array, and ValueError for what would take more
      than `MAX_BYTES`.
  """
  if isinstance(encoded, np.ndarray):
    return _from_pixels(encoded)
  if not isinstance(encoded, bytes | bytearray | memoryview):
    raise TypeError(f"an image must be bytes, got {type(encoded).__name__}")
  encoded = bytes(encoded)
  if not encoded:
    raise ValueError("empty file")
  _check_memory(len(encoded))
  try:
    image = Image.open(io.BytesIO(encoded), formats=_formats())
  except UnidentifiedImageError:
    raise ValueError("not an image of a known format") from None
  is_deep = image.mode in ("I", "F")
  check_size(image.width, image.height, _SCALED if is_deep else _PIXEL)
  if decoder == "simplejpeg" and encoded.startswith(_JPEG):
    pixels = _decode_by_simplejpeg(encoded, image)
    if pixels is not None:
      return Image.fromarray(pixels)
  if is_deep or image.mode.startswith("I;16"):
    return Image.fromarray(_eight_bits(image)).convert("RGB")
  if image.mode == "LAB":
    return _lab_to_rgb(image)
  if image.mode == "RGB":
    image.load()  # Converting would copy it.
    return image
  return image.convert("RGB")


def read_image(path: pathlib.Path) -> bytes:
  """Reads an image file.

  Raises:
    OSError: if it cannot be read.
    ValueError: if it is larger than `MAX_BYTES`.
  """
  with path.open("rb") as file:
    _check_memory(os.fstat(file.fileno()).st_size)
    return file.read()


def check_size(width: int, height: int, pixel: int = _PIXEL) -> None:
  """Checks that an image of Pillow takes no more than `MAX_BYTES`.

  Args:
    width: in pixels.
    height: in pixels.
    pixel: bytes of a pixel.

  Raises:
    ValueError: if it takes more.
  """
  _check_memory(height * (width * pixel + _ROW))


def _check_memory(num_bytes: int) -> None:
  if num_bytes > MAX_BYTES:
    raise ValueError(
      f"takes {num_bytes:,} bytes of memory, more than {MAX_BYTES:,}"
    )


def _from_pixels(pixels: np.ndarray) -> Image.Image:
  is_image = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
  if pixels.dtype != np.uint8 or not is_image:
    raise ValueError(
      f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}"
    )
  check_size(pixels.shape[1], pixels.shape[0])
  return Image.fromarray(pixels)


@functools.cache
def _formats() -> tuple[str, ...]:
  """Those that this version of Pillow has."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode_by_simplejpeg(
  encoded: bytes, image: Image.Image
) -> np.ndarray | None:
  """RGB pixels; None where Pillow decides.

  Pillow has read the header already, so that both decoders refuse the same.
  """
  import simplejpeg  # An extra.

  if image.mode not in ("RGB", "L"):
    return None  # Only Pillow converts other colour spaces.
  try:
    # Strict: where libjpeg would pass over damage, it is Pillow's to judge.
    pixels = simplejpeg.decode_jpeg(encoded, strict=True)
  except Exception:
    return None
  return pixels if pixels.shape == (image.height, image.width, 3) else None


def _eight_bits(image: Image.Image) -> np.ndarray:
  """Grey values of more than 8 bits as uint8 [H, W]."""
  values = np.asarray(image)
  tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
  bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
  if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT) == (_UNSIGNED,):
    values = values.view(np.uint32)
  # Of other formats, Pillow gives 16 bits in the mode for 32.
  if image.mode == "F" or (image.mode == "I" and tags):
    grey = _stretch(values)
  else:
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
  # Pillow turns this only where there are 8 bits or fewer.
  return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _stretch(values: np.ndarray) -> np.ndarray:
  """The least finite value to 0, the greatest to 255; NaN to 0."""
  finite = np.isfinite(values)
  if not finite.any():
    raise ValueError("no pixel has a finite value")
  grey = values.astype(np.float64)
  low = grey.min(where=finite, initial=np.inf)
  high = grey.max(where=finite, initial=-np.inf)
  grey -= low
  grey *= 255 / ((high - low) or 1)
  np.nan_to_num(grey, copy=False, nan=0, posinf=255, neginf=0)
  return np.rint(grey, out=grey).astype(np.uint8)


def _lab_to_rgb(image: Image.Image) -> Image.Image:
  lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
  transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
  converted = ImageCms.applyTransform(image, transform)
  assert converted is not None  # As it would be after a change in place.
  return converted
