"""State fusion written as its equation, the tests' reference."""

import jax.numpy as jnp

from spatial_mamba_kernels.typing import Array


def state_fusion(
  h: Array,
  kernels: Array,
  alpha: Array,
  *,
  dilations: tuple[int, ...] = (1, 3, 5),
) -> Array:
  """See `spatial_mamba_kernels.state_fusion`; differentiated by JAX."""
  _, height, width, _ = h.shape
  y = jnp.zeros_like(h)
  for m, dilation in enumerate(dilations):
    for r in range(3):
      for c in range(3):
        rows = jnp.arange(height) + (r - 1) * dilation
        columns = jnp.arange(width) + (c - 1) * dilation
        rows = jnp.clip(rows, 0, height - 1)
        columns = jnp.clip(columns, 0, width - 1)
        weight = alpha[m] * kernels[m, r, c]
        y += weight[None, None, None] * h[:, rows][:, :, columns]
  return y
