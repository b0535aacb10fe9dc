"""What the fusion's kernels have in common: dimensions, and partial sums."""

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.by_platform import Arrays, Dimensions
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.state_fusion.taps import Stencil

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
DIMENSIONS = Dimensions(
  arguments=(IMAGE, (WHOLE, WHOLE, WHOLE, CHANNELS), (WHOLE,)),
  result=IMAGE,
  saved=(),
)

# Of dh, and of the merged weights, [G, T, D].
SUMS = (IMAGE, (BATCH, WHOLE, CHANNELS))


def finish(arrays: Arrays, sums: Arrays, *, stencil: Stencil) -> Arrays:
  """Cotangents of the operator's arguments, from partial sums."""
  dh, dweights = sums
  _, unmerge = jax.vjp(stencil.merge, *arrays[1:])
  return dh, *unmerge(jnp.sum(dweights, axis=0))
