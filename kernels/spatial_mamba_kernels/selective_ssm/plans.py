"""The SSM's kernels: dimensions, what each can serve, and its module."""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE

TOKENS = (BATCH, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE)

DIMENSIONS = Dimensions(
  arguments=(
    TOKENS,
    TOKENS,
    (CHANNELS, WHOLE),
    NUMBERS,
    NUMBERS,
    (CHANNELS,),
    (CHANNELS,),
  ),
  result=TOKENS,
  saved=((WHOLE, WHOLE, BATCH, CHANNELS),),
)

# Of du, ddelta; dB, dC [K, B, L, N]; and A, delta_bias and D [G, N + 2, D].
PARTS = (CHANNELS, *NUMBERS)
SUMS = (TOKENS, TOKENS, PARTS, PARTS, (BATCH, WHOLE, CHANNELS))

# Tokens of a segment, which a GPU's program loads at a time. Of segments twice
# as long, a multiprocessor has room for one program with 16 states, not two.
SEGMENT = 16
# Values that a thread of a GPU keeps in registers at most, with and without a
# TMA; with more, some compiler spills.
_MOST_VALUES = {True: 200, False: 199}


def segment(states: int) -> int:
  """Returns after how many tokens the kernels save the state."""
  del states
  return SEGMENT


def tokens_summed(states: int) -> int:
  """Returns of how many tokens a GPU sums over channels at once."""
  return _power_of_2(gpu.ROWS_SUMMED // states, segment(states))


def piece(states: int) -> int:
  """Returns the tokens in one unrolled piece of a GPU kernel's code."""
  # A, adjoints and their sums; for a token states, decays, u, dy, and the time
  # step in three forms.
  free = _MOST_VALUES[device().tma] - 3 * states
  return _power_of_2(free // (2 * states + 6), segment(states))


def _power_of_2(size, most):
  """Returns the largest power of 2 up to both; 1 at least."""
  return 1 << (max(1, min(size, most)).bit_length() - 1)


def finish(arrays: Arrays, sums: Arrays) -> Arrays:
  """Cotangents of the operator's arguments, from partial sums."""
  del arrays
  du, ddelta, dB, dC, parameters = sums
  parameters = jnp.sum(parameters, axis=0)
  dA, dbias, dD = parameters[:-2].T, parameters[-2], parameters[-1]
  return du, ddelta, dA, jnp.sum(dB, axis=0), jnp.sum(dC, axis=0), dD, dbias


def gpu_plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  gpu.check_states(arrays[2].shape[1])


KERNELS = {
  "mosaic_gpu": Kernel(
    gpu_plan, "spatial_mamba_kernels.selective_ssm.mosaic_gpu", finish, SUMS
  ),
}
