"""The fusion's kernels: dimensions, what each can serve, and its module."""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.taps import Stencil
from spatial_mamba_kernels.tpu import plan as tpu

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
DIMENSIONS = Dimensions(
  arguments=(IMAGE, (WHOLE, WHOLE, WHOLE, CHANNELS), (WHOLE,)),
  result=IMAGE,
  saved=(),
)

# Dimensions of the partial sums: dh, and the cotangent of the merged weights,
# [G, T, D].
SUMS = (IMAGE, (BATCH, WHOLE, CHANNELS))


def finish(arrays: Arrays, sums: Arrays, *, stencil: Stencil) -> Arrays:
  """Cotangents of the operator's arguments, from partial sums."""
  dh, dweights = sums
  _, unmerge = jax.vjp(stencil.merge, *arrays[1:])
  return dh, *unmerge(jnp.sum(dweights, axis=0))


def tpu_plan(arrays: Arrays, *, stencil: Stencil) -> tpu.Cut:
  """Returns the cut for the backward pass, which needs the most VMEM."""
  h, *_ = arrays
  batch, _, width, channels = h.shape
  kept = stencil.window + stencil.cotangent_rows + 1

  def bytes_of(group, lanes):
    state_row = tpu.image_row_bytes(width, group, lanes, 4)
    image_row = tpu.image_row_bytes(width, group, lanes, h.dtype.itemsize)
    numbers = tpu.numbers_bytes(len(stencil.taps), group, lanes)
    return kept * state_row + 2 * 3 * image_row + numbers

  keeps = f"{kept} rows of {width} pixels"
  return tpu.cut(arrays, batch, channels, bytes_of, keeps=keeps)


def gpu_plan(arrays: Arrays, *, stencil: Stencil) -> None:
  """Raises NotImplementedError where the kernels cannot serve."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  h, *_ = arrays
  gpu.cut_to_fuse(h.shape, stencil, h.dtype, h.dtype)
  gpu.cut_to_states(h.shape, stencil, h.dtype, h.dtype)


def kernels(dilations: tuple[int, ...]) -> dict[str, Kernel]:
  """Returns the kernels for these dilations."""
  stencil = Stencil(dilations)
  plans = {"mosaic_tpu": tpu_plan, "mosaic_gpu": gpu_plan}
  return {
    name: Kernel(
      partial(plan, stencil=stencil),
      f"spatial_mamba_kernels.state_fusion.{name}",
      partial(finish, stencil=stencil),
      SUMS,
      {"stencil": stencil},
    )
    for name, plan in plans.items()
  }
