"""The scan's kernels: dimensions, what each can serve, and its module."""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.tpu import plan as tpu

TOKENS = (BATCH, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE)
STATES = (BATCH, WHOLE, WHOLE, CHANNELS)
STATE = (BATCH, CHANNELS, WHOLE)

DIMENSIONS = Dimensions(
  arguments=(TOKENS, TOKENS, (CHANNELS, WHOLE), NUMBERS, (CHANNELS,), STATE),
  result=STATES,
  saved=(STATES,),
)

# Of du, ddelta, dB [K, B, L, N], [G, N + 1, D] of A and delta_bias, and dh0.
PARAMETERS = (BATCH, WHOLE, CHANNELS)
SUMS = (TOKENS, TOKENS, (CHANNELS, *NUMBERS), PARAMETERS, STATE)


def finish(arrays: Arrays, sums: Arrays) -> Arrays:
  """Cotangents of the operator's arguments, from partial sums."""
  del arrays
  du, ddelta, dB, parameters, dh0 = sums
  parameters = jnp.sum(parameters, axis=0)
  dA, dbias = parameters[:-1].T, parameters[-1]
  return du, ddelta, dA, jnp.sum(dB, axis=0), dbias, dh0


def tpu_plan(arrays: Arrays) -> tpu.Cut:
  """Returns the cut for the backward pass, which needs the most VMEM."""
  u, delta, A, *_ = arrays
  batch, length, channels = u.shape
  states, width = A.shape[1], tpu.row_length(length)
  itemsize = max(u.dtype.itemsize, delta.dtype.itemsize)

  def bytes_of(group, lanes):
    image_row = tpu.image_row_bytes(width, group, lanes, itemsize)
    lane_rows = states * tpu.lane_row_bytes(width, group)
    state_row = states * tpu.image_row_bytes(width, group, lanes, 4)
    numbers = tpu.numbers_bytes(2 * (states + 1), group, lanes)
    # The recomputed row, and two buffers for each block of inputs and outputs.
    return 3 * state_row + 2 * (4 * image_row + 2 * lane_rows) + numbers

  keeps = f"3 rows of {width} tokens and {states} states"
  return tpu.cut(arrays, batch, channels, bytes_of, keeps=keeps)


def gpu_plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where there are too many states."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  gpu.check_states(arrays[2].shape[1])


KERNELS = {
  "mosaic_tpu": Kernel(
    tpu_plan, "spatial_mamba_kernels.selective_scan.mosaic_tpu", finish, SUMS
  ),
  "mosaic_gpu": Kernel(
    gpu_plan, "spatial_mamba_kernels.selective_scan.mosaic_gpu", finish, SUMS
  ),
}
