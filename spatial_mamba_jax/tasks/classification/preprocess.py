"""Augments a training batch on the device.

Random erasing of each image, then mixup or cutmix of the batch, as in the
authors' recipe (timm 0.4.12, `RandomErasing` and `Mixup`).

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

from spatial_mamba_jax.tasks.classification.config import (
  ClassificationConfig,
  MixingConfig,
)
from spatial_mamba_jax.tasks.classification.losses import smoothed_targets
from spatial_mamba_jax.tasks.normalisation import normalise

# Ranges of the erased box's share of the area, and of its height / width.
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)
_ERASING_ATTEMPTS = 10
# Number of quantiles that represent a Beta distribution; a uint16 is the index.
_QUANTILES = 2**16


def prepare(
  batch: Mapping[str, Array], key: Array, config: ClassificationConfig
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B K"]]:
  """Normalises, erases, smooths labels, and applies mixup or cutmix.

  Args:
    batch: "image", uint8 [B, H, W, 3], and "label", int32 [B].
    key: random key.
    config: the task's config.

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


def random_erasing(
  images: Float[Array, "B H W 3"], key: Array, probability: float
) -> Float[Array, "B H W 3"]:
  """Fills a box of some images with noise (arXiv 1708.04896).

  Args:
    images: normalised, so that noise is N(0, 1) in each pixel and channel.
    key: random key.
    probability: probability of erasing in an image.
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
  """Draws a box for each image; it is empty if none of ten draws fits.

  The box's share of the area is uniform, its aspect ratio log-uniform, its
  position uniform. The first of ten draws smaller than the image is taken.

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
  """Applies mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) to a batch.

  Image i is mixed with image B - 1 - i. All images share the same draw.
  """
  if not config.probability:
    return images, target
  mixed_key, switch_key, mixup_key, cutmix_key = jax.random.split(key, 4)
  height, width = images.shape[1:3]
  lam = _draw_beta(mixup_key, config.mixup_alpha)
  box_mask, box_lam = cutmix_box(cutmix_key, height, width, config.cutmix_alpha)
  is_cutmix = jax.random.bernoulli(switch_key, config.cutmix_probability)
  is_mixed = jax.random.bernoulli(mixed_key, config.probability)
  # The weight of an image itself, in each pixel.
  own = jnp.where(is_cutmix, 1 - box_mask, lam)
  own = jnp.where(is_mixed, own, 1).astype(images.dtype)[None, :, :, None]
  lam = jnp.where(is_mixed, jnp.where(is_cutmix, box_lam, lam), 1)
  mixed = own * images + (1 - own) * images[::-1]
  lam = lam.astype(target.dtype)
  return mixed, lam * target + (1 - lam) * target[::-1]


def cutmix_box(
  key: Array, height: int, width: int, alpha: float
) -> tuple[Float[Array, "H W"], Float[Array, ""]]:
  """Draws the box that cutmix takes from the other image.

  Its sides are sqrt(1 - lambda) times the image's, with lambda ~ Beta(alpha,
  alpha). Its centre is uniform, and it is clipped to the image.

  Returns:
    A mask that is 1 in the box; and the share of the area outside of the box.
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
  """Draws from Beta(alpha, alpha), as one of many quantiles.

  The loops of `jax.random.beta` would be a fifth of a training step's compile
  time.
  """
  return jnp.asarray(_beta_quantiles(alpha), float)[
    jax.random.bits(key, (), jnp.uint16)
  ]


@functools.cache
def _beta_quantiles(alpha: float) -> np.ndarray:
  shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
  return scipy.special.betaincinv(alpha, alpha, shares)


def _inside(low: Int[Array, "*B"], high: Int[Array, "*B"], size: int) -> Array:
  """Returns whether low <= index < high, for the indices 0 to size - 1."""
  low, high = low[..., None], high[..., None]
  indices = with_rank_of(low, jnp.arange(size))
  return (low <= indices) & (indices < high)
