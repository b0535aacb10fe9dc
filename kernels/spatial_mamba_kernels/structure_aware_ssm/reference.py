"""The structure-aware SSM composed of the reference operators."""

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.selective_scan.reference import selective_scan
from spatial_mamba_kernels.state_fusion.reference import state_fusion
from spatial_mamba_kernels.typing import Array


def structure_aware_ssm(
  u: Array,
  delta: Array,
  A: Array,
  B: Array,
  C: Array,
  D: Array,
  kernels: Array,
  alpha: Array,
  *,
  delta_bias: Array | float = 0.0,
) -> Array:
  """See `spatial_mamba_kernels.structure_aware_ssm`."""
  batch, height, width, _ = u.shape
  u_tokens, delta_tokens, B_tokens = (
    x.reshape(batch, height * width, -1) for x in (u, delta, B)
  )
  h = selective_scan(u_tokens, delta_tokens, A, B_tokens, delta_bias=delta_bias)
  h = h.reshape(batch, height, width, *A.shape)
  fuse = jax.vmap(state_fusion, in_axes=(-1, None, None), out_axes=-1)
  return (
    jnp.sum(C[..., None, :] * fuse(h, kernels, alpha), axis=-1)
    + D[None, None, None] * u
  )
