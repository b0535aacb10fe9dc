"""From an image file to the pixels of a batch, as the authors' recipe does it.

The recipe uses timm 0.4.12 and torchvision; everything is Pillow underneath,
and so is this, so that the same file gives the same pixels. Randomness comes
from the generator that is passed in, and from nowhere else.
"""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.randaugment import randaugment

_CROP_ATTEMPTS = 10
_JPEG = b"\xff\xd8\xff"
# Without this list a broken file would be tried on every plugin of Pillow,
# some of which start other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def decode_image(
  encoded: bytes | np.ndarray, decoder: str = "pillow"
) -> Image.Image:
  """Decodes an image file to RGB.

  Transparency is dropped and the EXIF orientation is not applied, as in the
  recipe's loader.

  Args:
    encoded: the file's bytes; or pixels, uint8 [H, W, 3], which only change
      their type.
    decoder: of JPEG files in RGB or grey; all else is Pillow's.

  Raises:
    Exception: whatever the decoder makes of a broken file.
  """
  if isinstance(encoded, np.ndarray):
    return Image.fromarray(encoded)
  if not encoded:
    raise ValueError("empty file")
  if decoder == "simplejpeg" and encoded.startswith(_JPEG):
    pixels = _decode_by_simplejpeg(encoded)
    if pixels is not None:
      return Image.fromarray(pixels)
  try:
    image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
  except UnidentifiedImageError:
    raise ValueError("not an image of a known format") from None
  if image.mode.startswith("I"):
    # 16-bit greyscale, of which Pillow would turn all but black to white.
    high_byte = np.asarray(image) >> 8
    image = Image.fromarray(high_byte.clip(0, 255).astype(np.uint8))
  return image.convert("RGB")


def _decode_by_simplejpeg(encoded: bytes) -> np.ndarray | None:
  """RGB pixels, or None for the colour spaces that only Pillow converts."""
  import simplejpeg  # An extra.

  colourspace = simplejpeg.decode_jpeg_header(encoded, strict=False)[2]
  if colourspace not in ("YCbCr", "RGB", "Gray"):
    return None
  return simplejpeg.decode_jpeg(encoded)


def transform_for_training(
  image: Image.Image, config: DataConfig, rng: np.random.Generator
) -> np.ndarray:
  """Crop, mirror image and RandAugment: uint8 [image_size, image_size, 3].

  What else the recipe does to a training image is done to batches on the
  device.
  """
  image = random_resized_crop(image, config, rng)
  if rng.random() < config.flip_probability:
    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(randaugment(image, config, rng))


def transform_for_evaluation(
  image: Image.Image, config: DataConfig
) -> np.ndarray:
  """The central part of the image: uint8 [image_size, image_size, 3].

  The shorter side becomes `int(image_size / test_crop_ratio)`, then the centre
  is cropped (torchvision's `Resize` and `CenterCrop`).
  """
  size = config.image_size
  short = int(size / config.test_crop_ratio)
  width, height = image.size
  if width <= height:
    width, height = short, int(short * height / width)
  else:
    width, height = int(short * width / height), short
  image = image.resize((width, height), Image.Resampling.BICUBIC)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def random_resized_crop(
  image: Image.Image, config: DataConfig, rng: np.random.Generator
) -> Image.Image:
  """A random part of the image, resized to a square of `image_size` pixels."""
  box = sample_crop(
    *image.size, scale=config.crop_scale, ratio=config.crop_ratio, rng=rng
  )
  # Not resize(box=...): that would let pixels outside the crop bleed in.
  return image.crop(box).resize(
    (config.image_size, config.image_size), Image.Resampling.BICUBIC
  )


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
    width: of the image, in pixels.
    height: of the image, in pixels.
    scale: range of the crop's area as a share of the image's; uniform.
    ratio: range of the crop's width / height; log-uniform.
    rng: where the draws come from.

  Returns:
    left, top, right and bottom in pixels. If no draw fits into the image: the
    largest central crop whose aspect ratio is in range.
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
