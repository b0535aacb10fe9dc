"""Images for pictures: a user's files, or photographs of scikit-learn."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from spatial_mamba_jax.data.decoding import decode_image, read_image
from spatial_mamba_jax.data.transforms import transform_for_evaluation
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.preprocessing import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  Preprocessing,
)

# Photographs that scikit-learn ships, under Creative Commons licences.
PHOTOGRAPHS = ("flower.jpg", "china.jpg")


def read_images(files: Sequence[pathlib.Path], size: int) -> list[np.ndarray]:
  """Returns the centres of images, resized: uint8 [size, size, 3].

  Args:
    files: image files. If there are none, `PHOTOGRAPHS` are read.
    size: height and width in pixels.

  Raises:
    UserError: a file is not an image.
    OSError: a file cannot be read.
  """
  preprocessing = Preprocessing(image_size=size, short_side=size)
  return [
    transform_for_evaluation(image, preprocessing)
    for image in (map(_read, files) if files else _photographs())
  ]


def normalise(pixels: np.ndarray, channels: int) -> np.ndarray:
  """Normalises an image as the recipe does: float32 [H, W, channels].

  Args:
    pixels: uint8 [H, W, 3].
    channels: 3; or 1, for the mean of the colours.

  Raises:
    UserError: the network needs another number of channels.
  """
  image = (pixels / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
  if channels == 1:
    image = image.mean(axis=-1, keepdims=True)
  elif channels != 3:
    raise UserError(
      f"the network takes {channels} channels; images have 3, or 1 in grey"
    )
  return image.astype(np.float32)


def _read(file: pathlib.Path) -> Image.Image:
  encoded = read_image(file)
  try:
    return decode_image(encoded)
  # What a broken file raises depends on the decoder.
  except Exception as error:
    raise UserError(f"{file} is no image that can be read: {error}") from error


def _photographs() -> list[Image.Image]:
  from sklearn.datasets import load_sample_image

  return [Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS]
