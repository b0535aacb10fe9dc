"""How the states of an SSM become its output, in plain JAX."""

import jax.numpy as jnp

from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float


def observe(
  C: Float[Array, "*B N"],
  states: Float[Array, "*B N D"],
  D: Float[Array, " D"],
  u: Float[Array, "*B D"],
) -> Float[Array, "*B D"]:
  """Reads the states out, and adds the skip connection."""
  C, D, x = (array.astype(states.dtype) for array in (C, D, u))
  return (_observe(C, states) + with_rank_of(x, D) * x).astype(u.dtype)


def _observe(C: Array, states: Array) -> Array:
  """Sums C[n] * states[n] over n: [..., N] and [..., N, D] to [..., D]."""
  # As in the scan: for N = 1 this form makes C's cotangent faster on a CPU.
  if C.shape[-1] == 1:
    return C * jnp.squeeze(states, -2)
  return jnp.sum(C[..., None] * states, axis=-2)
