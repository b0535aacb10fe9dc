"""An MLP in plain JAX."""

import math

import jax

from spatial_mamba_kernels.by_platform import keep
from spatial_mamba_kernels.typing import Array, Float


def mlp(
  x: Float[Array, "B H W C"],
  w1: Float[Array, "C F"],
  b1: Float[Array, "F"],
  w2: Float[Array, "F C"],
  b2: Float[Array, "C"],
) -> Float[Array, "B H W C"]:
  """See `spatial_mamba_kernels.mlp`."""
  return _linear(gelu(keep(_linear(x, w1, b1))), w2, b2)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The exact GELU; `jax.nn.gelu`'s erfc costs twice as much on a CPU."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def _linear(x, weights, bias):
  return x @ weights.astype(x.dtype) + bias.astype(x.dtype)
