"""The SSM's kernels: dimensions, what each can serve, and its module."""

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.taps import DILATIONS, Stencil
from spatial_mamba_kernels.tpu import plan as tpu

STENCIL = Stencil(DILATIONS)

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE, WHOLE)

DIMENSIONS = Dimensions(
  arguments=(
    IMAGE,
    IMAGE,
    (CHANNELS, WHOLE),
    NUMBERS,
    NUMBERS,
    (CHANNELS,),
    (WHOLE, WHOLE, WHOLE, CHANNELS),
    (WHOLE,),
    (CHANNELS,),
  ),
  result=IMAGE,
  saved=((WHOLE, WHOLE, BATCH, CHANNELS),),
)


def tpu_plan(arrays: Arrays) -> tpu.Cut:
  """Returns the cut for the backward pass, which needs the most VMEM."""
  u, delta, A, *_ = arrays
  batch, _, width, channels = u.shape
  states = A.shape[1]
  itemsize = max(u.dtype.itemsize, delta.dtype.itemsize)

  kept = STENCIL.window + STENCIL.cotangent_rows + 1

  def bytes_of(group, lanes):
    state_row = states * tpu.image_row_bytes(width, group, lanes, 4)
    image_row = tpu.image_row_bytes(width, group, lanes, itemsize)
    lane_rows = states * tpu.lane_row_bytes(width, group)
    count = len(STENCIL.taps) + 4 * states + 2
    numbers = tpu.numbers_bytes(count, group, lanes)
    # Two buffers for each row of inputs and outputs: three images and two
    # cotangents.
    buffers = 2 * (5 * image_row + 5 * lane_rows)
    rings = kept * state_row + 3 * (STENCIL.reach + 1) * image_row
    return rings + buffers + numbers

  keeps = f"{kept} rows of {width} tokens and {states} states"
  return tpu.cut(arrays, batch, channels, bytes_of, keeps=keeps)


def _finish_tpu(arrays, sums):
  du, ddelta, dB, dC, parameters = sums
  taps, states = len(STENCIL.taps), dB.shape[-1]
  dweights, dA, (dbias, dD) = jnp.split(
    jnp.sum(parameters, axis=0), (taps, taps + states)
  )
  _, unmerge = jax.vjp(STENCIL.merge, *arrays[6:8])
  dB, dC = jnp.sum(dB, axis=0), jnp.sum(dC, axis=0)
  return du, ddelta, dA.T, dB, dC, dD, *unmerge(dweights), dbias


def gpu_plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernels cannot serve."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  u, _, A, *_ = arrays
  if A.shape[1] > 1:
    raise NotImplementedError(
      f"mosaic_gpu observes one state a channel, not {A.shape[1]}"
    )
  gpu.cut_to_fuse(u.shape, STENCIL, jnp.float32, u.dtype)
  gpu.cut_to_states(u.shape, STENCIL, jnp.float32, u.dtype)


def _finish_gpu(arrays, sums):
  du, ddelta, dB, dC, dweights, parameters = sums
  *dA, dbias, dD = jnp.sum(parameters, axis=0)
  _, unmerge = jax.vjp(STENCIL.merge, *arrays[6:8])
  dkernels, dalpha = unmerge(jnp.sum(dweights, axis=0))
  dA, dB, dC = jnp.stack(dA, -1), jnp.sum(dB, axis=0), jnp.sum(dC, axis=0)
  return du, ddelta, dA, dB, dC, dD, dkernels, dalpha, dbias


_IMAGES = (IMAGE, IMAGE, (CHANNELS, *NUMBERS), (CHANNELS, *NUMBERS))
_PARAMETERS = (BATCH, WHOLE, CHANNELS)

KERNELS = {
  "mosaic_tpu": Kernel(
    tpu_plan,
    "spatial_mamba_kernels.structure_aware_ssm.mosaic_tpu",
    _finish_tpu,
    sums=(*_IMAGES, _PARAMETERS),
  ),
  "mosaic_gpu": Kernel(
    gpu_plan,
    "spatial_mamba_kernels.structure_aware_ssm.mosaic_gpu",
    _finish_gpu,
    sums=(*_IMAGES, _PARAMETERS, _PARAMETERS),
  ),
}
