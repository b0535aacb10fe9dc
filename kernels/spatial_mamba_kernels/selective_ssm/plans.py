"""The SSM's kernels: dimensions, what each can serve, and its module."""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
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

# States of a channel in a segment, at most: the GPU's backward pass keeps those
# of 128 channels in shared memory.
_STATES_OF_SEGMENT = 256


def segment(states: int) -> int:
  """Returns after how many tokens the kernels save the state.

  At most half of a longest row of the TPU kernels, which save the state after
  each row: so there are no more rows than segments.
  """
  return max(1, min(_STATES_OF_SEGMENT // states, tpu.CONFIG.row // 2))


def saved_states(length: int, states: int) -> int:
  """Returns how many segments have their state saved."""
  return -(-length // segment(states))


def row_length(length: int) -> int:
  """Returns how many tokens a row of the TPU kernels has.

  If that is no divisor of `length`, rows are as even as possible.
  """
  rows = -(-length // tpu.row_length(length))
  return -(-length // rows)


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


def _finish_tpu(arrays, sums):
  del arrays
  du, ddelta, dB, dC, parameters = sums
  *dA, dbias, dD = jnp.sum(parameters, axis=0)
  dB, dC = jnp.sum(dB, axis=0), jnp.sum(dC, axis=0)
  return du, ddelta, jnp.stack(dA, axis=-1), dB, dC, dD, dbias


KERNELS: dict[str, Kernel] = {
  "mosaic_tpu": Kernel(
    tpu_plan,
    "spatial_mamba_kernels.selective_ssm.mosaic_tpu",
    _finish_tpu,
    sums=(
      TOKENS,
      TOKENS,
      (CHANNELS, *NUMBERS),
      (CHANNELS, *NUMBERS),
      (BATCH, WHOLE, CHANNELS),
    ),
  ),
}
