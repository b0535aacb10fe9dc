"""What a network expects of its images."""

import dataclasses

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import check_fields, number

# Mean and standard deviation of ImageNet's pixels, by channel, for pixels in
# [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Most pixels of an image's side: the image takes 0.8 GB, and int32 counts its
# tokens.
MAX_IMAGE_SIZE = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
  """How images become the input of a network.

  An image is resized so that its shorter side has `short_side` pixels, its
  central square of `image_size` pixels is cropped, and its pixels in [0, 1] are
  normalised. The defaults are `IMAGENET`.

  Attributes:
    image_size: height and width of the input, in pixels.
    short_side: shorter side of the resized image, in pixels.
    mean: mean of the pixels, by channel.
    std: standard deviation of the pixels, by channel.
  """

  image_size: int = number(224, least=1, most=MAX_IMAGE_SIZE)
  short_side: int = number(256, least=1, most=16 * MAX_IMAGE_SIZE)
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = number(IMAGENET_STD, above=0)

  def __post_init__(self):
    check_fields(self)
    if self.image_size > self.short_side:
      raise UserError(
        f"image_size must be at most short_side={self.short_side}, got"
        f" {self.image_size}"
      )


# Of the authors' networks for ImageNet.
IMAGENET = Preprocessing()
