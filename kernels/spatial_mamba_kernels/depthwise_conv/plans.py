"""The convolutions' kernels: forms, dimensions, and what each can serve."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.sharding import (
  BATCH,
  CHANNELS,
  WHOLE,
  share_of_device,
)

# Columns of a projection at most: with more, a separate product costs less than
# the work here for each value of an image.
MOST_PROJECTED = 20

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
KERNEL = (WHOLE, WHOLE, CHANNELS)
PLAIN_DIMENSIONS = Dimensions((IMAGE, KERNEL), result=IMAGE, saved=())
DIMENSIONS = Dimensions((IMAGE, KERNEL, (CHANNELS,)), result=IMAGE, saved=())
PROJECTED_DIMENSIONS = Dimensions(
  (*DIMENSIONS.arguments, (WHOLE, WHOLE)),
  result=(IMAGE, (BATCH, WHOLE, WHOLE, WHOLE)),
  saved=(),
)
# Of the convolution with a stride, after ReLU.
STRIDED_DIMENSIONS = Dimensions(
  (IMAGE, (CHANNELS,), KERNEL), result=IMAGE, saved=()
)
OFFSETS = (-1, 0, 1)
TAPS = tuple(itertools.product(OFFSETS, OFFSETS))
# Dimensions of the partial sums: the cotangents of x, and of the rest.
_SUMS = (IMAGE, (BATCH, WHOLE, CHANNELS))


class Form(NamedTuple):
  """What is fused with a convolution.

  Attributes:
    forward: (x, kernel, *others, convolve=) -> result.
    has_residual: whether its input is added to it.
    has_silu: whether a SiLU follows.
    is_projected: whether the result comes with its projection.
  """

  forward: Callable[..., Any]
  has_residual: bool = False
  has_silu: bool = False
  is_projected: bool = False

  @property
  def reach(self) -> int:
    """Columns to either side that a cotangent of the input depends on."""
    return 2 if self.has_silu else 1


PLAIN = Form(xla.plain)
RESIDUAL = Form(xla.residual, has_residual=True)
SILU = Form(xla.activated, has_silu=True)
PROJECTED = Form(xla.projected, has_silu=True, is_projected=True)


def kernels(form: Form) -> dict[str, Kernel]:
  """Returns the kernels for one of the forms."""
  kernel = Kernel(
    partial(plan, form=form),
    "spatial_mamba_kernels.depthwise_conv.mosaic_gpu",
    _finish,
    _SUMS,
    {"form": form},
  )
  return {"mosaic_gpu": kernel}


def plan(arrays: Arrays, *, form: Form) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  x, kernel, *_ = arrays
  if kernel.shape[:2] != (3, 3):
    raise NotImplementedError(
      f"mosaic_gpu convolves by 3 x 3, not {kernel.shape[0]} x"
      f" {kernel.shape[1]}"
    )
  batch, *_, channels = x.shape
  if not device().tma and channels % gpu.CHANNELS:
    raise NotImplementedError(
      f"mosaic_gpu would pad both images of {channels} channels to blocks of"
      f" {gpu.CHANNELS} here"
    )
  if form.is_projected:
    _check_projected(batch, channels, arrays[-1].shape[1])
  cut(x, form)


def _check_projected(batch, channels, numbers):
  if numbers > MOST_PROJECTED:
    raise NotImplementedError(
      f"mosaic_gpu projects to {MOST_PROJECTED} numbers at most, not {numbers}"
    )
  _, channels_of_device = share_of_device(batch, channels)
  if channels_of_device < channels:
    raise NotImplementedError("mosaic_gpu projects all channels of a token")


def cut(x: Any, form: Form) -> gpu.Cut:
  """Returns how images like these are cut."""
  size = gpu.CHANNELS * jnp.dtype(x.dtype).itemsize

  def bytes_of(strip, read):
    rows = (gpu.ring_rows(1) + gpu.ring_rows(0)) * read
    return (rows + strip) * size

  # Without a TMA, rows are loaded ahead into registers.
  columns = gpu.MOST_COLUMNS // (1 if device().tma else 2)
  return gpu.cut(x.shape, form.reach, bytes_of, columns=columns)


def _finish(arrays, sums):
  dx, sums = sums
  dweights, dbias, dprojection = jnp.split(
    jnp.sum(sums, axis=0), (len(TAPS), len(TAPS) + 1)
  )
  dkernel = dweights.reshape(arrays[1].shape)
  return (dx, dkernel, dbias[0], dprojection.T)[: len(arrays)]


def strided_kernels(stride: int) -> dict[str, Kernel]:
  """Returns the kernels of `relu_depthwise_conv` for a stride of 2 or more."""
  kernel = Kernel(
    strided_plan,
    "spatial_mamba_kernels.depthwise_conv.gpu_strided",
    _finish_strided,
    _SUMS,
    {"stride": stride},
  )
  return {"mosaic_gpu": kernel}


def strided_plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  batch, *_, channels = arrays[0].shape
  _, channels = share_of_device(batch, channels)
  if channels % gpu.LANES:
    raise NotImplementedError(
      f"mosaic_gpu sums over {gpu.LANES} channels of a device, or a multiple,"
      f" not {channels}"
    )


def _finish_strided(arrays, sums):
  _, _, weights = arrays
  dx, sums = sums
  sums = jnp.sum(sums, axis=0)
  dkernel = sums[: len(TAPS)].reshape(weights.shape)
  return dx, sums[len(TAPS)], dkernel
