"""What the scan's kernels have in common: dimensions, and partial sums."""

import jax.numpy as jnp

from spatial_mamba_kernels.by_platform import Arrays, Dimensions
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE

TOKENS = (BATCH, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE)
STATES = (BATCH, WHOLE, WHOLE, CHANNELS)

DIMENSIONS = Dimensions(
  arguments=(TOKENS, TOKENS, (CHANNELS, WHOLE), NUMBERS, (CHANNELS,)),
  result=STATES,
  saved=(STATES,),
)

# Of du, ddelta, dB [K, B, L, N] and [G, N + 1, D], of A and delta_bias.
SUMS = (TOKENS, TOKENS, (CHANNELS, *NUMBERS), (BATCH, WHOLE, CHANNELS))


def finish(arrays: Arrays, sums: Arrays) -> Arrays:
  """Cotangents of the operator's arguments, from partial sums."""
  del arrays
  du, ddelta, dB, parameters = sums
  parameters = jnp.sum(parameters, axis=0)
  return du, ddelta, parameters[:-1].T, jnp.sum(dB, axis=0), parameters[-1]
