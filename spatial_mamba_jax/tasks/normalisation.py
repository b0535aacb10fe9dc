"""Normalisation of images, by default by the statistics of ImageNet."""

import jax.numpy as jnp
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.preprocessing import IMAGENET, Preprocessing


def normalise(
  images: Array, preprocessing: Preprocessing = IMAGENET
) -> Float[Array, "B H W 3"]:
  """Converts bytes to floats, by default of mean 0 and deviation 1."""
  mean = 255 * jnp.asarray(preprocessing.mean, jnp.float32)
  std = 255 * jnp.asarray(preprocessing.std, jnp.float32)
  images = images.astype(jnp.float32)
  return (images - with_rank_of(images, mean)) / with_rank_of(images, std)
