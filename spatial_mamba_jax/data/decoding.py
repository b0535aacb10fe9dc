"""Decodes image files to RGB, within a limit on memory."""

import functools
import io
import os
import pathlib
from collections.abc import Mapping
from typing import IO, Any, cast

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Most bytes of an image's file, of its decoded pixels and of its resized
# pixels, each. An image that needs more is unreadable. Pillow itself refuses
# more than 178,956,970 pixels.
MAX_BYTES = 2**30
# Bytes that Pillow needs for a pixel, for a row's pointer, and for a 32-bit
# pixel while `_stretch` scales it.
_PIXEL, _ROW, _SCALED = 4, 8, 16

# {Pillow's name of a format: lower-case suffixes of its files}, for the formats
# that are read. Without this list Pillow would try every plugin on a broken
# file, and some plugins start other programs. TGA is left out: it has no
# signature, so that any bytes may pass for it.
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
# Codes of TIFF's tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
# Code of EXIF's tag, and what turns an image upright by its value.
_ORIENTATION = 274
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
# The values by which height and width change places.
_ON_ITS_SIDE = frozenset({5, 6, 7, 8})
# A value of the tag `_PHOTOMETRIC`, and a value of `_SAMPLE_FORMAT`.
_WHITE_IS_ZERO, _UNSIGNED = 0, 1


def decode_image(encoded: Any, decoder: str = "pillow") -> Image.Image:
  """Decodes an image file to RGB.

  Transparency is dropped and the EXIF orientation is not applied, as in the
  recipe's loader. The first of several frames is decoded. 16-bit grey values
  are reduced to their high byte. Floats, 32-bit and signed integers are scaled
  linearly: the image's least finite value becomes black, its greatest white.

  Args:
    encoded: the file's bytes; or pixels, uint8 [H, W, 3], which need no
      decoding.
    decoder: decoder of RGB and grey JPEG files, one of `DECODERS`. Pillow
      decodes all other files, and those that simplejpeg refuses.

  Raises:
    TypeError: `encoded` is neither bytes nor an array.
    ValueError: the image needs more than `MAX_BYTES`.
    Exception: the file is broken; the type depends on the decoder.
  """
  if isinstance(encoded, np.ndarray):
    return _from_pixels(encoded)
  if not isinstance(encoded, bytes | bytearray | memoryview):
    raise TypeError(f"an image must be bytes, got {type(encoded).__name__}")
  encoded = bytes(encoded)
  image = open_image(encoded)
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


def decode_upright(encoded: Any, decoder: str = "pillow") -> Image.Image:
  """Decodes an image file to RGB, in its EXIF orientation.

  Arguments and exceptions are those of `decode_image`. Pixels have no
  orientation.
  """
  image = decode_image(encoded, decoder)
  if isinstance(encoded, np.ndarray):
    return image
  turn = _TURNS.get(_orientation(open_image(bytes(encoded))))
  return image if turn is None else image.transpose(turn)


def image_size(encoded: bytes) -> tuple[int, int]:
  """Returns width and height in pixels, from an image file's header.

  Raises:
    ValueError: the format is unknown, or the file is too large.
    Exception: the header is broken; the type depends on the format.
  """
  return open_image(encoded).size


def read_upright_size(path: pathlib.Path) -> tuple[int, int]:
  """Returns height and width in the EXIF orientation, from a file's header.

  Raises:
    OSError: the file cannot be read.
    ValueError: the format is unknown.
    Exception: the header is broken; the type depends on the format.
  """
  with path.open("rb") as file:
    image = _read_header(file)
    width, height = image.size
    is_on_its_side = _orientation(image) in _ON_ITS_SIDE
  return (width, height) if is_on_its_side else (height, width)


def read_image(path: pathlib.Path) -> bytes:
  """Reads an image file.

  Raises:
    OSError: it cannot be read.
    ValueError: it is larger than `MAX_BYTES`.
  """
  with path.open("rb") as file:
    _check_memory(os.fstat(file.fileno()).st_size)
    return file.read()


def check_size(width: int, height: int, pixel: int = _PIXEL) -> None:
  """Checks that an image of this size needs at most `MAX_BYTES` in Pillow.

  Args:
    width: width in pixels.
    height: height in pixels.
    pixel: bytes of a pixel.

  Raises:
    ValueError: it needs more.
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


def open_image(encoded: bytes) -> Image.Image:
  """Opens an image file and reads its header.

  Raises:
    ValueError: the format is unknown, or the file is empty or too large.
    Exception: the header is broken; the type depends on the format.
  """
  if not encoded:
    raise ValueError("empty file")
  _check_memory(len(encoded))
  return _read_header(io.BytesIO(encoded))


def _read_header(file: io.BufferedIOBase) -> Image.Image:
  try:
    return Image.open(cast(IO[bytes], file), formats=_formats())
  except UnidentifiedImageError:
    raise ValueError("not an image of a known format") from None


def _orientation(image: Image.Image) -> int:
  """Returns the value of EXIF's tag; 1 (upright) without one.

  Pillow itself turns TIFF files, and gives their tags by another name.
  """
  exif = Image.Exif()
  try:
    exif.load(image.info.get("exif", b""))
    value = exif.get(_ORIENTATION)
  except Exception:  # Broken metadata; the pixels may be whole.
    return 1
  return value if isinstance(value, int) else 1


@functools.cache
def _formats() -> tuple[str, ...]:
  """Returns the names in `FORMATS` that this version of Pillow supports."""
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode_by_simplejpeg(
  encoded: bytes, image: Image.Image
) -> np.ndarray | None:
  """Returns RGB pixels, or None to leave the file to Pillow.

  Pillow has already read the header, so that both decoders refuse the same
  files.
  """
  import simplejpeg  # An extra.

  if image.mode not in ("RGB", "L"):
    return None  # Only Pillow converts other colour spaces.
  try:
    # Strict: libjpeg would ignore some damage that Pillow refuses.
    pixels = simplejpeg.decode_jpeg(encoded, strict=True)
  except Exception:
    return None
  return pixels if pixels.shape == (image.height, image.width, 3) else None


def _eight_bits(image: Image.Image) -> np.ndarray:
  """Returns grey values of more than 8 bits as uint8 [H, W]."""
  values = np.asarray(image)
  tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
  bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
  if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT) == (_UNSIGNED,):
    values = values.view(np.uint32)
  # In mode "I", files other than TIFF have 16-bit values.
  if image.mode == "F" or (image.mode == "I" and tags):
    grey = _stretch(values)
  else:
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
  # Pillow itself inverts only images of at most 8 bits.
  return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _stretch(values: np.ndarray) -> np.ndarray:
  """Maps the least finite value to 0, the greatest to 255, and NaN to 0."""
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
  assert converted is not None  # It is None only for an in-place transform.
  return converted
