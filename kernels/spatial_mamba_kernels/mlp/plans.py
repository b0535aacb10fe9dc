"""The MLP's kernel: dimensions, and what it can serve."""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.sharding import BATCH, WHOLE

# Tokens of a tile: the rows of Hopper's matrix products.
TOKENS = 64
WARPGROUPS = 2
# Size of the scratch of `sum_rows`, for 64 columns.
EXCHANGED = 4 * 32 * 2
BARRIER_BYTES = 1024
# Slots for parts of the weights in shared memory, loaded ahead.
STAGES = 2
# Channels at most: more would leave too few registers.
MOST_CHANNELS = 256

_IMAGE = (BATCH, WHOLE, WHOLE, WHOLE)
_SUMS = ((BATCH, WHOLE, WHOLE), (BATCH, WHOLE)) * 2

DIMENSIONS = Dimensions(
  arguments=(
    *(_IMAGE, (WHOLE, WHOLE), (WHOLE,), (WHOLE, WHOLE), (WHOLE,)),
    *(_IMAGE, (BATCH,)),
  ),
  result=_IMAGE,
  saved=(),
)


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernels cannot serve."""
  gpu.check_served(arrays[:-1])
  x, w1, *_ = arrays
  if not device().wgmma:
    raise NotImplementedError("mosaic_gpu multiplies by Hopper's tensor cores")
  if x.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f"mosaic_gpu multiplies bfloat16 alone, not {x.dtype}"
    )
  channels, hidden = w1.shape
  if channels % 32 or channels > MOST_CHANNELS:
    raise NotImplementedError(
      f"mosaic_gpu multiplies 32 channels or a multiple, up to {MOST_CHANNELS},"
      f" not {channels}"
    )
  for images in (1, 2):
    units_of_weights(channels, hidden, images)


def units_of_weights(channels: int, hidden: int, images: int) -> int:
  """Returns the hidden units computed at a time.

  Args:
    channels: channels of a token.
    hidden: hidden units in all.
    images: images whose tokens are loaded.

  Raises:
    NotImplementedError: shared memory has no room for them.
  """
  for units in (64, 32):
    tokens = WARPGROUPS * TOKENS * images * (channels + units)
    numbers = tokens + STAGES * 2 * channels * units
    others = 4 * WARPGROUPS * EXCHANGED + BARRIER_BYTES
    if hidden % units == 0 and 2 * numbers + others <= device().smem_bytes:
      return units
  raise NotImplementedError(
    f"mosaic_gpu computes 32 hidden units at a time, not {hidden} in all"
  )


def _finish(arrays, sums):
  dx, *cotangents, dy = sums
  cotangents = (jnp.sum(x, axis=0) for x in cotangents)
  return dx, *cotangents, dy, jnp.zeros_like(arrays[-1])


KERNELS = {
  "mosaic_gpu": Kernel(
    plan,
    "spatial_mamba_kernels.mlp.mosaic_gpu",
    _finish,
    (_IMAGE, *_SUMS, _IMAGE),
  )
}
