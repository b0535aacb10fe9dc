"""The selective SSM written as its equations, the tests' reference."""

import jax.numpy as jnp

from spatial_mamba_kernels.selective_scan.reference import selective_scan
from spatial_mamba_kernels.typing import Array


def selective_ssm(
  u: Array,
  delta: Array,
  A: Array,
  B: Array,
  C: Array,
  D: Array,
  *,
  delta_bias: Array | float = 0.0,
) -> Array:
  """See `spatial_mamba_kernels.selective_ssm`."""
  h = selective_scan(u, delta, A, B, delta_bias=delta_bias)
  return jnp.sum(C[:, :, None] * h, axis=-1) + D[None, None] * u
