"""The structure-aware SSM in plain JAX, composed of the scan and the fusion."""

import jax.numpy as jnp

from spatial_mamba_kernels.selective_scan import states as scan
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.state_fusion import fuse
from spatial_mamba_kernels.taps import DILATIONS
from spatial_mamba_kernels.typing import Array, Float


def structure_aware_ssm(
  u: Float[Array, "B H W D"],
  delta: Float[Array, "B H W D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B H W N"],
  C: Float[Array, "B H W N"],
  D: Float[Array, " D"],
  kernels: Float[Array, "3 3 3 D"],
  alpha: Float[Array, " 3"],
  delta_bias: Float[Array, " D"],
  *,
  implementation: str | None,
) -> Float[Array, "B H W D"]:
  """See `spatial_mamba_kernels.structure_aware_ssm`."""
  batch, height, width, _ = u.shape

  def tokens(x):
    return x.reshape(batch, height * width, -1)

  states = scan(
    tokens(u),
    tokens(delta),
    A,
    tokens(B),
    delta_bias,
    implementation=implementation,
  )
  states = states.reshape(batch, height, width, *states.shape[2:])
  fused = fuse(states, kernels, alpha, DILATIONS)
  return observe(C, fused, D, u)


def observe(
  C: Float[Array, "B H W N"],
  states: Float[Array, "B H W N D"],
  D: Float[Array, " D"],
  u: Float[Array, "B H W D"],
) -> Float[Array, "B H W D"]:
  """Reads the states out, and adds the skip connection."""
  C, D, image = (x.astype(states.dtype) for x in (C, D, u))
  return (_observe(C, states) + with_rank_of(image, D) * image).astype(u.dtype)


def _observe(C: Array, states: Array) -> Array:
  """Sums C[n] * states[n] over n: [..., N] and [..., N, D] to [..., D]."""
  # As in the scan: for N = 1 this form makes C's cotangent faster on a CPU.
  if C.shape[-1] == 1:
    return C * jnp.squeeze(states, -2)
  return jnp.sum(C[..., None] * states, axis=-2)
