"""The SSM's kernels: dimensions, what each can serve, and its module."""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.tpu import plan as tpu

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


def tokens_summed(states: int) -> int:
  """Returns of how many tokens a GPU sums over channels at once."""
  return _power_of_2(gpu.ROWS_SUMMED // states, SEGMENT)


def piece(states: int) -> int:
  """Returns the tokens in one unrolled piece of a GPU kernel's code."""
  # A, adjoints and their sums; for a token states, decays, u, dy, and the time
  # step in three forms.
  free = _MOST_VALUES[device().tma] - 3 * states
  return _power_of_2(free // (2 * states + 6), SEGMENT)


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


def row_length(length: int) -> int:
  """Returns how many tokens a row of the TPU kernels has.

  If that is no divisor of `length`, rows are as even as possible.
  """
  rows = -(-length // tpu.row_length(length))
  return -(-length // rows)


def saved_states(length: int) -> int:
  """Returns how many states the forward pass saves at most.

  A GPU saves one before each segment, a TPU one for each row, which is longer
  unless `tpu.plan.CONFIG` is changed.
  """
  return max(-(-length // SEGMENT), -(-length // row_length(length)))


def tpu_plan(arrays: Arrays) -> tpu.Cut:
  """Returns the cut for the backward pass, which needs the most VMEM."""
  u, delta, A, *_ = arrays
  batch, length, channels = u.shape
  states, width = A.shape[1], row_length(length)
  itemsize = max(u.dtype.itemsize, delta.dtype.itemsize)

  def bytes_of(group, lanes):
    state_row = states * tpu.image_row_bytes(width, group, lanes, 4)
    image_row = tpu.image_row_bytes(width, group, lanes, itemsize)
    lane_rows = states * tpu.lane_row_bytes(width, group)
    numbers = tpu.numbers_bytes(5 * states + 2, group, lanes)
    # The recomputed row, and two buffers for each row of inputs and outputs:
    # three of tokens, two cotangents; B, C and theirs.
    return state_row + 2 * (5 * image_row + 4 * lane_rows) + numbers

  keeps = f"a row of {width} tokens and {states} states"
  return tpu.cut(arrays, batch, channels, bytes_of, keeps=keeps)


def gpu_plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  gpu.check_states(arrays[2].shape[1])


KERNELS = {
  "mosaic_tpu": Kernel(
    tpu_plan, "spatial_mamba_kernels.selective_ssm.mosaic_tpu", finish, SUMS
  ),
  "mosaic_gpu": Kernel(
    gpu_plan, "spatial_mamba_kernels.selective_ssm.mosaic_gpu", finish, SUMS
  ),
}
