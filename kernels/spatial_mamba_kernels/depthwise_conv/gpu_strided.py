"""The cotangents of a depthwise convolution's weights, with a stride.

As nine sums, XLA reads what is convolved five times for them. A warpgroup has
several images at the same pixel, so that borders are the same for all of it: 4
where it has 256 channels, and up to 32 where these are fewer. Missing ones are
zeros.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.by_platform import Arrays, Kernel, Passes
from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.gpu_threads import plgpu
from spatial_mamba_kernels.gpu_tokens import LANES, Tokens
from spatial_mamba_kernels.sharding import channels_of_device
from spatial_mamba_kernels.state_fusion.dimensions import SUMS
from spatial_mamba_kernels.typing import Array

# Of a program: nine sums of more would fill a thread's registers.
CHANNELS = 256
# Programs that keep the multiprocessors of a device busy.
PROGRAMS = 528


def kernel(stride: int) -> Kernel:
  """The kernel for a stride of 2 or more."""
  passes = Passes(
    partial(_run_forward, stride=stride), partial(_run_backward, stride=stride)
  )
  return Kernel(plan, passes, _finish, SUMS)


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  batch, *_, channels = arrays[0].shape
  channels = channels_of_device(batch, channels)
  if channels % LANES:
    raise NotImplementedError(
      f"mosaic_gpu sums over {LANES} channels of a device, or a multiple, not"
      f" {channels}"
    )


def _run_forward(arrays, *, save, stride):
  """The convolution on one device; there is nothing to save."""
  del save
  return (xla.shifted(*arrays, stride=stride),)


def _run_backward(arrays, saved, g, *, stride):
  """The cotangents [B, H, W, D] of x, and [G, 9, D] of the weights."""
  del saved
  x, weights = arrays
  dx = xla.shifted_to_input(x, weights, g, stride=stride)
  return dx, weights_backward(x, g, stride=stride)


def _finish(arrays, sums):
  dx, dweights = sums
  return dx, jnp.sum(dweights, axis=0).reshape(arrays[1].shape)


def tokens_of(channels: int) -> Tokens:
  """Those that a program has at a time, of images with so many channels."""
  return Tokens(math.gcd(channels, CHANNELS))


def weights_backward(x: Array, g: Array, *, stride: int) -> Array:
  """The cotangents of the weights.

  Args:
    x: [B, H, W, D].
    g: [B, ceil(H / stride), ceil(W / stride), D].
    stride: of the convolution.

  Returns:
    [G, 9, D], to be summed over G.
  """
  channels = x.shape[-1]
  tokens = tokens_of(channels)
  padding = [(0, -len(x) % tokens.count), (0, 0), (0, 0), (0, 0)]
  x, g = (jnp.pad(image, padding) for image in (x, g))
  images, blocks = len(x) // tokens.count, channels // tokens.channels
  rows = -(-g.shape[1] // -(-PROGRAMS // (images * blocks)))
  strips = -(-g.shape[1] // rows)
  sums = plgpu.kernel(
    partial(_kernel, tokens=tokens, stride=stride, rows=rows),
    out_type=jax.ShapeDtypeStruct((images, strips, 9, channels), jnp.float32),
    grid=(images, strips, blocks),
    grid_names=("images", "strip", "block"),
    kernel_name="depthwise_conv_strided_weights",
    compiler_params=tokens.compiler_params(sums=True),
  )(x, g)
  return sums.reshape(-1, 9, channels)


def _kernel(x, g, sums, *, tokens, stride, rows):
  _, height, width, _ = x.shape
  _, rows_out, columns_out, _ = g.shape
  image, strip = lax.axis_index("images"), lax.axis_index("strip")
  images = pl.ds(image * tokens.count, tokens.count)
  first = lax.axis_index("block") * tokens.channels
  channels = pl.ds(first, tokens.channels)

  def add(total, cotangents, row, column):
    nearest = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
    product = cotangents * tokens.load(x, (images, *nearest, channels))
    is_inside = (nearest[0] == row) & (nearest[1] == column)
    return total + jnp.where(is_inside, product, 0)

  def step(pixel, totals):
    row = strip * rows + pixel // columns_out
    column = pixel % columns_out
    cotangents = tokens.load(g, (images, row, column, channels))
    return [
      add(
        total,
        cotangents,
        row * stride + tap // 3 - 1,
        column * stride + tap % 3 - 1,
      )
      for tap, total in enumerate(totals)
    ]

  own = jnp.minimum(rows, rows_out - strip * rows)
  totals = [tokens.zeros()] * 9
  totals = lax.fori_loop(0, own * columns_out, step, totals)
  for tap, total in enumerate(totals):
    gpu.store(sums.at[image, strip, tap, channels], jnp.sum(total, axis=0))
