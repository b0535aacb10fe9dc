"""The cotangents of a depthwise 3x3 convolution's weights as a GPU kernel.

As nine sums, XLA reads both images five times for them. The convolution itself
and the cotangents of its input are a fusion of XLA's, one pass over memory.
"""

import jax.numpy as jnp

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.by_platform import Arrays, Dimensions, Kernel, Passes
from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.gpu_device import device
from spatial_mamba_kernels.sharding import CHANNELS, WHOLE
from spatial_mamba_kernels.state_fusion import mosaic_gpu as fusion
from spatial_mamba_kernels.state_fusion.dimensions import IMAGE, SUMS
from spatial_mamba_kernels.state_fusion.taps import Stencil
from spatial_mamba_kernels.typing import Array

# In the order of the kernel's places.
STENCIL = Stencil((1,))

DIMENSIONS = Dimensions(
  arguments=(IMAGE, (WHOLE, WHOLE, CHANNELS)), result=IMAGE, saved=()
)


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  x, _ = arrays
  if not device().tma and x.shape[-1] % gpu.CHANNELS:
    raise NotImplementedError(
      f"mosaic_gpu would pad both images of {x.shape[-1]} channels to blocks"
      f" of {gpu.CHANNELS} here"
    )
  fusion.cut_to_fuse(x.shape, STENCIL, x.dtype, x.dtype)


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The convolution on one device; there is nothing to save."""
  del save
  return (xla.shifted(*arrays, stride=1),)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """The cotangents [B, H, W, D] of x, and [G, 9, D] of the weights."""
  del saved
  x, kernel = arrays
  (dweights,) = fusion.weights_backward(
    x, kernel.reshape(9, -1), g, stencil=STENCIL, replicate=False
  )
  return xla.shifted_to_input(x, kernel, g, stride=1), dweights


def _finish(arrays, sums):
  dx, dweights = sums
  return dx, jnp.sum(dweights, axis=0).reshape(arrays[1].shape)


KERNEL = Kernel(plan, Passes(run_forward, run_backward), _finish, SUMS)
