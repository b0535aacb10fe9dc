"""The cotangents of a rectified and then convolved image, with a stride.

XLA reads the image twice for them, and five times more for nine sums. Here each
of its pixels is read once: it takes part in up to four pixels of the result,
whose cotangents are in registers. A warpgroup has several images at the same
pixel, so that borders are the same for all of it: 4 where it has 128 channels,
and up to 16 where these are fewer. Missing ones are zeros.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.activations import relu
from spatial_mamba_kernels.by_platform import Arrays, Dimensions, Kernel, Passes
from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.gpu_device import device, is_default
from spatial_mamba_kernels.gpu_threads import plgpu
from spatial_mamba_kernels.gpu_tokens import LANES, Tokens
from spatial_mamba_kernels.sharding import CHANNELS, WHOLE, share_of_device
from spatial_mamba_kernels.state_fusion.dimensions import IMAGE, SUMS
from spatial_mamba_kernels.typing import Array

# Of a program.
MOST_CHANNELS = 128
# Of a thread, which has nine weights and ten sums for each.
NUMBERS = 4
# Of a program; each has work of its own. Four fill a multiprocessor's registers
# with 128 a thread, which just do; for GPUs without a TMA it takes more.
WARPGROUPS, OLDER_WARPGROUPS = 4, 3
# Warpgroups that a device runs at once.
WORKERS = 528

DIMENSIONS = Dimensions(
  arguments=(IMAGE, (CHANNELS,), (WHOLE, WHOLE, CHANNELS)),
  result=IMAGE,
  saved=(),
)


def kernel(stride: int) -> Kernel:
  """The kernel for a stride of 2 or more."""
  passes = Passes(
    partial(_run_forward, stride=stride), partial(_run_backward, stride=stride)
  )
  return Kernel(plan, passes, _finish, SUMS)


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  # Elsewhere what is rectified is kept, which is decided in tracing.
  if not is_default():
    raise NotImplementedError(
      "mosaic_gpu convolves with a stride where a GPU is JAX's default device"
    )
  batch, *_, channels = arrays[0].shape
  _, channels = share_of_device(batch, channels)
  if channels % LANES:
    raise NotImplementedError(
      f"mosaic_gpu sums over {LANES} channels of a device, or a multiple, not"
      f" {channels}"
    )


def _run_forward(arrays, *, save, stride):
  """The convolution on one device; there is nothing to save."""
  del save
  x, bias, weights = arrays
  rectified = relu(xla.biased(x, bias))
  return (xla.shifted(rectified, weights, stride=stride),)


def _run_backward(arrays, saved, g, *, stride):
  """The cotangents of x, and of weights and bias [G, 9 + 1, D]."""
  del saved
  x, bias, weights = arrays
  return backward(x, bias, weights, g, stride=stride)


def _finish(arrays, sums):
  _, _, weights = arrays
  dx, sums = sums
  sums = jnp.sum(sums, axis=0)
  return dx, sums[9], sums[:9].reshape(weights.shape)


def tokens_of(channels: int) -> Tokens:
  """Those that a program has at a time, of images with so many channels."""
  return Tokens(math.gcd(channels, MOST_CHANNELS), NUMBERS)


def backward(
  x: Array, bias: Array, weights: Array, g: Array, *, stride: int
) -> Arrays:
  """The cotangents of `relu_depthwise_conv`.

  Args:
    x: [B, H, W, D].
    bias: [D].
    weights: [3, 3, D].
    g: [B, ceil(H / stride), ceil(W / stride), D].
    stride: of the convolution, 2 or more.

  Returns:
    [B, H, W, D] of x; [G, 9 + 1, D], to be summed over G, of weights and bias.
  """
  batch, *_, channels = x.shape
  tokens = tokens_of(channels)
  padding = [(0, -batch % tokens.count), (0, 0), (0, 0), (0, 0)]
  x, g = (jnp.pad(image, padding) for image in (x, g))
  images, blocks = len(x) // tokens.count, channels // tokens.channels
  rows = -(-g.shape[1] // max(WORKERS // (images * blocks), 1))
  strips = -(-g.shape[1] // rows)
  warpgroups = WARPGROUPS if device().tma else OLDER_WARPGROUPS
  dx, sums = plgpu.kernel(
    partial(_kernel, tokens=tokens, stride=stride, rows=rows),
    out_type=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((images, strips, 10, channels), jnp.float32),
    ),
    scratch_types={
      "tiles": plgpu.SMEM((warpgroups, *tokens.shape), jnp.float32)
    },
    grid=(-(-images * strips * blocks // warpgroups),),
    grid_names=("program",),
    num_threads=warpgroups,
    thread_name="warpgroup",
    kernel_name="relu_depthwise_conv_backward",
    compiler_params=tokens.compiler_params(sums=False),
  )(
    x,
    bias.astype(x.dtype).astype(jnp.float32),
    weights.reshape(9, channels).astype(jnp.float32),
    g,
  )
  return dx[:batch], sums.reshape(-1, 10, channels)


def _kernel(x, bias, weights, g, dx, sums, *, tiles, tokens, stride, rows):
  images, strips, _, channels = sums.shape
  blocks = channels // tokens.channels
  me = lax.axis_index("warpgroup")
  work = tiles.shape[0] * lax.axis_index("program") + me
  image, strip = work // (strips * blocks), work // blocks % strips
  first = work % blocks * tokens.channels
  channels = pl.ds(first, tokens.channels)
  own = (
    pl.ds(image * tokens.count, tokens.count),
    slice(None),
    slice(None),
    channels,
  )
  first_row = strip * rows
  rows = jnp.minimum(rows, g.shape[1] - first_row)

  @pl.when(work < images * strips * blocks)
  def _():
    totals = _strip(
      x.at[own],
      bias.at[channels],
      weights.at[:, channels],
      g.at[own],
      dx.at[own],
      (first_row, first_row + rows),
      tokens=tokens,
      stride=stride,
    )
    for place, total in enumerate(totals):
      out = sums.at[image, strip, place, channels]
      tokens.store_sum(total, tiles.at[me], out)


def _strip(x, bias, weights, g, dx, rows, *, tokens, stride):
  """Makes dx where g has these rows.

  Returns:
    Sums over them, for each image, of the nine taps and of the bias.
  """
  bias = tokens.parameters(bias)
  weights = [tokens.parameters(weights.at[tap]) for tap in range(9)]

  def load(ref, row, column):
    """A pixel and whether it is within the image; else it is another."""
    _, height, width, _ = ref.shape
    nearest = jnp.minimum(row, height - 1), jnp.minimum(column, width - 1)
    value = tokens.load(ref, (slice(None), *nearest))
    return value, (row < height) & (column < width)

  def cotangents(row, column):
    """Of a pixel of the result, and of the one below."""
    pixels = (load(g, row + i, column) for i in range(2))
    return tuple(jnp.where(is_inside, x, 0) for x, is_inside in pixels)

  def step(column, carry, *, row):
    """A pixel of the result, and as many of x as it stands for."""
    near, totals = carry
    far = cotangents(row, column + 1)
    pixels = {
      (i, j): load(x, row * stride + i, column * stride + j)
      for i in range(stride)
      for j in range(stride)
    }
    totals = list(totals)
    for (i, j), (value, is_inside) in pixels.items():
      rectified = jnp.where(is_inside, jnp.maximum(value + bias, 0), 0)
      total = None
      for place_row, tap_row in _taps(i, stride):
        for place_column, tap_column in _taps(j, stride):
          tap = 3 * tap_row + tap_column
          cotangent = (near, far)[place_column][place_row]
          totals[tap] += cotangent * rectified
          total = gpu.add(total, cotangent * weights[tap])
      total = tokens.zeros() if total is None else total
      total = jnp.where(rectified > 0, total, 0)
      totals[9] += total
      place = slice(None), row * stride + i, column * stride + j
      pl.when(is_inside)(partial(tokens.store, dx, place, total))
    return far, totals

  def step_row(row, totals):
    carry = cotangents(row, 0), totals
    _, totals = lax.fori_loop(0, g.shape[2], partial(step, row=row), carry)
    return totals

  first, end = rows
  return lax.fori_loop(first, end, step_row, [tokens.zeros()] * 10)


def _taps(offset, stride):
  """How a row, or a column, takes part in the result's next and the one after.

  Args:
    offset: from the first that the result's next stands for.
    stride: of the convolution, 2 or more.

  Returns:
    (0 for the next or 1 for the one after, the tap) of each.
  """
  taps = [(place, offset + 1 - place * stride) for place in range(2)]
  return [(place, tap) for place, tap in taps if 0 <= tap < 3]
