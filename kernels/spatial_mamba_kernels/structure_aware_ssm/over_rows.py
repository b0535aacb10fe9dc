"""The structure-aware SSM of images whose rows a mesh axis splits.

It is composed of the scan and the fusion over rows: two exchanges.
"""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.observation import observe
from spatial_mamba_kernels.selective_scan import selective_scan
from spatial_mamba_kernels.state_fusion import state_fusion
from spatial_mamba_kernels.typing import Array, Float


def structure_aware_ssm(
  arrays: Arrays, implementation: str | None
) -> Float[Array, "B H W D"]:
  """Applies the operator to images that are split by rows.

  Raises:
    ValueError: the rows do not divide evenly, or a device has too few.
    NotImplementedError: the mesh has an axis that cannot be used.
  """
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  batch, height, width, channels = u.shape

  def tokens(x):
    return x.reshape(batch, height * width, -1)

  h = selective_scan(
    tokens(u),
    tokens(delta),
    A,
    tokens(B),
    delta_bias=bias,
    implementation=implementation,
  )
  states = A.shape[1]
  # Each state of a channel is an image of its own.
  h = jnp.moveaxis(h, 3, 1).reshape(batch * states, height, width, channels)
  h = state_fusion(h, kernels, alpha, implementation=implementation)
  h = jnp.moveaxis(h.reshape(batch, states, height, width, channels), 1, 3)
  return observe(C, h, D, u)
