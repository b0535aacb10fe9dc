"""What the device does to a training batch before the model sees it.

Random erasing of each image, then mixup or cutmix of the batch, as the authors'
recipe has them (timm 0.4.12, `RandomErasing` and `Mixup`).

Axis letters: B batch, H and W height and width, K classes.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.data import IMAGENET_MEAN, IMAGENET_STD
from spatial_mamba_jax.tasks.classification.config import (
  ClassificationConfig,
  MixingConfig,
)
from spatial_mamba_jax.tasks.classification.losses import smoothed_targets

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_ERASING_ATTEMPTS = 10
_QUANTILES = 2**16  # As many as a uint16 tells apart.


def prepare(
  batch: Mapping[str, Array], key: Array, config: ClassificationConfig
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B K"]]:
  """Normalisation, random erasing, label smoothing, mixup and cutmix.

  Args:
    batch: "image", uint8 [B, H, W, 3], and "label", int32 [B].
    key: of all draws.
    config: how much of each.

  Returns:
    Normalised images and soft targets.
  """
  erasing_key, mixing_key = jax.random.split(key)
  images = random_erasing(
    normalise(batch["image"]), erasing_key, config.erasing_probability
  )
  target = smoothed_targets(
    batch["label"], config.num_classes, config.label_smoothing
  )
  return mix(images, target, mixing_key, config.mixing)


def normalise(images: Array) -> Float[Array, "B H W 3"]:
  """Bytes to floats with ImageNet's mean 0 and deviation 1."""
  mean = 255 * jnp.asarray(IMAGENET_MEAN, jnp.float32)
  std = 255 * jnp.asarray(IMAGENET_STD, jnp.float32)
  images = images.astype(jnp.float32)
  return (images - with_rank_of(images, mean)) / with_rank_of(images, std)


def random_erasing(
  images: Float[Array, "B H W 3"], key: Array, probability: float
) -> Float[Array, "B H W 3"]:
  """Fills a box of some images with noise (arXiv 1708.04896).

  Args:
    images: normalised, so that noise is N(0, 1) in each pixel and channel.
    key: of all draws.
    probability: with which an image is chosen.
  """
  if not probability:
    return images
  count, height, width, _ = images.shape
  chosen_key, box_key, noise_key = jax.random.split(key, 3)
  chosen = jax.random.bernoulli(chosen_key, probability, (count,))
  top, left, bottom, right = erased_boxes(box_key, count, height, width)
  erased = (
    _inside(top, bottom, height)[:, :, None]
    & (_inside(left, right, width)[:, None, :])
  )
  erased &= chosen[:, None, None]
  noise = jax.random.normal(noise_key, images.shape, images.dtype)
  return jnp.where(erased[..., None], noise, images)


def erased_boxes(
  key: Array, count: int, height: int, width: int
) -> tuple[Int[Array, " B"], ...]:
  """Draws a box for each image, which is empty if no draw fits into it.

  The share of the area is uniform, the aspect ratio log-uniform, the place
  uniform; of ten draws the first is taken that is smaller than the image.

  Returns:
    top, left, bottom and right, in pixels.
  """
  area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
  draws = (count, _ERASING_ATTEMPTS)
  low, high = _ERASED_AREA
  area = height * width * jax.random.uniform(area_key, draws, float, low, high)
  low, high = map(math.log, _ERASED_RATIO)
  root = jnp.exp(jax.random.uniform(ratio_key, draws, float, low, high) / 2)
  heights = jnp.round(jnp.sqrt(area) * root).astype(int)
  widths = jnp.round(jnp.sqrt(area) / root).astype(int)
  fits = (heights < height) & (widths < width)
  first = jnp.argmax(fits, axis=1, keepdims=True)

  def taken(sizes):
    size = jnp.take_along_axis(jnp.where(fits, sizes, 0), first, axis=1)
    return jnp.squeeze(size, 1)

  box_height, box_width = taken(heights), taken(widths)
  top = jax.random.randint(top_key, (count,), 0, height - box_height + 1)
  left = jax.random.randint(left_key, (count,), 0, width - box_width + 1)
  return top, left, top + box_height, left + box_width


def mix(
  images: Float[Array, "B H W 3"],
  target: Float[Array, "B K"],
  key: Array,
  config: MixingConfig,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B K"]]:
  """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of a batch.

  All images of a batch are mixed alike, image i with image B - 1 - i.
  """
  if not config.probability:
    return images, target
  mixed_key, switch_key, mixup_key, cutmix_key = jax.random.split(key, 4)
  height, width = images.shape[1:3]
  lam = _draw_beta(mixup_key, config.mixup_alpha)
  box_mask, box_lam = cutmix_box(cutmix_key, height, width, config.cutmix_alpha)
  is_cutmix = jax.random.bernoulli(switch_key, config.cutmix_probability)
  is_mixed = jax.random.bernoulli(mixed_key, config.probability)
  # The share of its own that each pixel keeps.
  kept = jnp.where(is_cutmix, 1 - box_mask, lam)
  kept = jnp.where(is_mixed, kept, 1).astype(images.dtype)[None, :, :, None]
  lam = jnp.where(is_mixed, jnp.where(is_cutmix, box_lam, lam), 1)
  mixed = kept * images + (1 - kept) * images[::-1]
  lam = lam.astype(target.dtype)
  return mixed, lam * target + (1 - lam) * target[::-1]


def cutmix_box(
  key: Array, height: int, width: int, alpha: float
) -> tuple[Float[Array, "H W"], Float[Array, ""]]:
  """Draws the box that cutmix takes from the partner.

  Its sides are the root of 1 - lambda of the image's, lambda ~ Beta(alpha,
  alpha); its centre is uniform, and what reaches beyond the image is cut off.

  Returns:
    1 within the box and 0 elsewhere; the share of the area outside of it.
  """
  lam_key, row_key, column_key = jax.random.split(key, 3)
  side = jnp.sqrt(1 - _draw_beta(lam_key, alpha))

  def interval(key, size):
    centre = jax.random.randint(key, (), 0, size)
    half = (size * side).astype(int) // 2
    return _inside(centre - half, centre + half, size)

  mask = interval(row_key, height)[:, None] & interval(column_key, width)[None]
  mask = mask.astype(float)
  return mask, 1 - jnp.mean(mask)


def _draw_beta(key: Array, alpha: float) -> Float[Array, ""]:
  """A number of Beta(alpha, alpha).

  One of many quantiles, because `jax.random.beta` has loops of its own that are
  a fifth of what there is to compile in a training step.
  """
  return jnp.asarray(_beta_quantiles(alpha), float)[
    jax.random.bits(key, (), jnp.uint16)
  ]


@functools.cache
def _beta_quantiles(alpha: float) -> np.ndarray:
  shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
  return scipy.special.betaincinv(alpha, alpha, shares)


def _inside(low: Int[Array, "*B"], high: Int[Array, "*B"], size: int) -> Array:
  """Whether low <= index < high for the indices 0 to size - 1."""
  low, high = low[..., None], high[..., None]
  indices = with_rank_of(low, jnp.arange(size))
  return (low <= indices) & (indices < high)
