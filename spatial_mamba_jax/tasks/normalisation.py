"""Normalisation of images by the statistics of ImageNet."""

import jax.numpy as jnp
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.data.config import IMAGENET_MEAN, IMAGENET_STD


def normalise(images: Array) -> Float[Array, "B H W 3"]:
  """Converts bytes to floats of mean 0 and deviation 1 over ImageNet."""
  mean = 255 * jnp.asarray(IMAGENET_MEAN, jnp.float32)
  std = 255 * jnp.asarray(IMAGENET_STD, jnp.float32)
  images = images.astype(jnp.float32)
  return (images - with_rank_of(images, mean)) / with_rank_of(images, std)
