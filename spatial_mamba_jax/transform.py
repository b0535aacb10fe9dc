"""Turns image files and pixels into the input of a network."""

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.preprocessing import Preprocessing

if TYPE_CHECKING:
  from PIL import Image

# A path, an encoded file, pixels (uint8 [H, W, 3]), or an image of Pillow.
ImageLike = Any


class Transform:
  """What evaluation does with images: resizes, crops and normalises them.

  Attributes:
    preprocessing: the sizes, the mean and the standard deviation.
  """

  def __init__(self, preprocessing: Preprocessing):
    self.preprocessing = preprocessing

  def __call__(
    self, images: ImageLike | Sequence[ImageLike]
  ) -> Float[Array, "B H W 3"]:
    """Returns the input of a network.

    Args:
      images: one image or a sequence of images, of any sizes: paths of files,
        encoded files (bytes), pixels (uint8 [H, W, 3]) or images of Pillow; or
        a batch of pixels, uint8 [B, H, W, 3].

    Raises:
      UserError: an image cannot be read.
    """
    return self.normalise(self.pixels(images))

  def normalise(self, pixels: np.ndarray) -> Float[Array, "B H W 3"]:
    """Normalises pixels, uint8 [B, H, W, 3]."""
    from spatial_mamba_jax.tasks.normalisation import normalise

    return normalise(jnp.asarray(pixels), self.preprocessing)

  def pixels(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
    """Resizes and crops alone: uint8 [B, image_size, image_size, 3]."""
    from spatial_mamba_jax.data.transforms import transform_for_evaluation

    if isinstance(images, jax.Array):
      images = np.asarray(images)
    return np.stack(
      [
        transform_for_evaluation(_opened(image), self.preprocessing)
        for image in (images if _is_several(images) else [images])
      ]
    )


def create_transform(model: Trunk) -> Transform:
  """Returns the transform from images to a network's input.

      transform = smj.create_transform(model)
      logits = model(transform("photo.jpg"))  # [1, num_classes]

  It needs Pillow, which is in the extra `train`.

  Args:
    model: a classifier or a backbone; its `config.preprocessing` has the sizes.

  Raises:
    UserError: the model takes images of another number of channels than 3, or
      is a segmentor, which takes images of any size: normalise them alone.
  """
  if not isinstance(model, Trunk):
    raise UserError(
      f"a {type(model).__name__} has no fixed size of images: use the transform"
      " of a classifier or a backbone, or normalise images of any size"
    )
  if model.config.in_channels != 3:
    raise UserError(
      f"the network takes images of {model.config.in_channels} channels, not 3"
    )
  return Transform(model.config.preprocessing)


def _is_several(images: Any) -> bool:
  if isinstance(images, np.ndarray):
    return images.ndim == 4
  return isinstance(images, Sequence) and not isinstance(images, str | bytes)


def _opened(image: ImageLike) -> "Image.Image":
  from PIL import Image

  from spatial_mamba_jax.data.decoding import decode_image, read_image

  if isinstance(image, Image.Image):
    return image.convert("RGB")
  name = "the image"
  try:
    if isinstance(image, str | os.PathLike):
      name = str(image)
      image = read_image(pathlib.Path(image))
    return decode_image(image)
  # What a broken file raises depends on the decoder.
  except Exception as error:
    raise UserError(f"{name} cannot be read: {error}") from error
