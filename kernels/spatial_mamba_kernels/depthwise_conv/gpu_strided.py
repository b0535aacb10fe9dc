"""The backward pass of a strided convolution after ReLU as one GPU kernel.

XLA would read the input twice for these cotangents, and five times more for
nine of the sums. Here each pixel of the input is read once: up to four pixels
of the result depend on it, whose cotangents are in registers. A warpgroup
computes the same pixel of several images, so that all its threads take the same
branch at a border: 4 images of 128 channels, up to 16 of fewer channels. The
batch is padded with zeros to a multiple of that. The forward pass is a fusion
of XLA, one pass over memory.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.depthwise_conv.plans import TAPS
from spatial_mamba_kernels.dispatch import Arrays, Results
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.gpu.tokens import Tokens
from spatial_mamba_kernels.typing import Array

# Channels of a warpgroup at most.
MOST_CHANNELS = 128
# Channels of a thread, which keeps nine weights and ten sums for each.
CHANNELS_OF_THREAD = 4
# Warpgroups of a program, which share no work. With four, a thread has 128
# registers, which just suffice; a GPU without a TMA needs more of them.
WARPGROUPS, OLDER_WARPGROUPS = 4, 3
# Warpgroups that a device runs at once.
WORKERS = 528
# Sums over pixels: the cotangents of the weights and of the bias.
SUMS = len(TAPS) + 1


def run_forward(arrays: Arrays, *, save: bool, stride: int) -> Results:
  """Returns the result on one device; saves nothing."""
  del save
  convolve = partial(xla.shifted, stride=stride)
  return (xla.after_relu(*arrays, convolve=convolve),)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Array, *, stride: int
) -> Arrays:
  """Returns the cotangents of x, and of weights and bias.

  Args:
    arrays: x, [B, H, W, D]; the bias, [D]; the weights, [3, 3, D].
    saved: nothing.
    g: [B, ceil(H / stride), ceil(W / stride), D].
    stride: stride of the convolution, 2 or more.

  Returns:
    [B, H, W, D], and [G, 9 + 1, D], to be summed over G.
  """
  del saved
  x, bias, weights = arrays
  batch, *_, channels = x.shape
  tokens = tokens_of(channels)
  padding = [(0, -batch % tokens.count), (0, 0), (0, 0), (0, 0)]
  x, g = (jnp.pad(image, padding) for image in (x, g))
  groups, blocks = len(x) // tokens.count, channels // tokens.channels
  rows = -(-g.shape[1] // max(WORKERS // (groups * blocks), 1))
  strips = -(-g.shape[1] // rows)
  warpgroups = WARPGROUPS if device().tma else OLDER_WARPGROUPS
  dx, sums = plgpu.kernel(
    partial(_kernel, tokens=tokens, stride=stride, rows=rows),
    out_type=(
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct((groups, strips, SUMS, channels), jnp.float32),
    ),
    scratch_types={
      "tiles_ref": plgpu.SMEM((warpgroups, *tokens.shape), jnp.float32)
    },
    grid=(-(-groups * strips * blocks // warpgroups),),
    grid_names=("program",),
    num_threads=warpgroups,
    thread_name="warpgroup",
    kernel_name="relu_depthwise_conv_backward",
    compiler_params=tokens.compiler_params(sums=False),
  )(
    x,
    bias.astype(x.dtype).astype(jnp.float32),
    weights.reshape(len(TAPS), channels).astype(jnp.float32),
    g,
  )
  return dx[:batch], sums.reshape(-1, SUMS, channels)


def tokens_of(channels: int) -> Tokens:
  """Returns the tile of a warpgroup, for images with so many channels."""
  return Tokens(math.gcd(channels, MOST_CHANNELS), CHANNELS_OF_THREAD)


def _kernel(
  x_ref, bias_ref, weights_ref, g_ref, dx_ref, sums_ref, *,
  tiles_ref, tokens, stride, rows,
):  # fmt: skip
  # Find the warpgroup's images, rows of results and channels.
  groups, strips, _, channels = sums_ref.shape
  blocks = channels // tokens.channels
  warpgroup = lax.axis_index("warpgroup")
  work = tiles_ref.shape[0] * lax.axis_index("program") + warpgroup
  group, strip = work // (strips * blocks), work // blocks % strips
  first = work % blocks * tokens.channels
  channels = pl.ds(first, tokens.channels)
  images = pl.ds(group * tokens.count, tokens.count)
  own = images, slice(None), slice(None), channels
  first_row = strip * rows
  end_row = jnp.minimum(first_row + rows, g_ref.shape[1])

  @pl.when(work < groups * strips * blocks)
  def _():
    # Compute the cotangents of x, and the sums.
    walk = _Walk(
      tokens,
      stride,
      x_ref.at[own],
      g_ref.at[own],
      dx_ref.at[own],
      tokens.parameters(bias_ref.at[channels]),
      [
        tokens.parameters(weights_ref.at[tap, channels])
        for tap in range(len(TAPS))
      ],
    )
    zeros = [tokens.zeros()] * SUMS
    sums = lax.fori_loop(first_row, end_row, walk.add_row, zeros)

    # Store the sums over the images.
    for index, total in enumerate(sums):
      result_ref = sums_ref.at[group, strip, index, channels]
      tokens.store_sum(total, tiles_ref.at[warpgroup], result_ref)


class _Walk(NamedTuple):
  """The steps of `_kernel` for a row of results, and what they take.

  Attributes:
    tokens: the tile of the warpgroup, one pixel of several images.
    stride: stride of the convolution.
    x_ref: reference to the input.
    g_ref: reference to the cotangents of the results.
    dx_ref: reference to the cotangents of the input.
    bias: a tile.
    weights: a tile for each of the taps.
  """

  tokens: Tokens
  stride: int
  x_ref: Any
  g_ref: Any
  dx_ref: Any
  bias: Array
  weights: list[Array]

  def add_row(self, row: Any, sums: list[Array]) -> list[Array]:
    """Adds the part of a row of results to the cotangents.

    It stores the input's cotangents in the `stride` rows from row * stride on.

    Args:
      row: index of the row.
      sums: the cotangents of the weights and of the bias.

    Returns:
      The new sums.
    """
    carry = self._cotangents(row, 0), sums
    step = partial(self._add_pixel, row)
    _, sums = lax.fori_loop(0, self.g_ref.shape[2], step, carry)
    return sums

  def _add_pixel(self, row, column, carry):
    """Does the same for a pixel, with the cotangents in its column and sums."""
    # Load the cotangents of the next column, and stride * stride inputs.
    near, sums = carry
    far = self._cotangents(row, column + 1)
    pixels = {
      (i, j): self._load(
        self.x_ref, row * self.stride + i, column * self.stride + j
      )
      for i in range(self.stride)
      for j in range(self.stride)
    }
    sums = list(sums)
    for (i, j), (value, is_inside) in pixels.items():
      # Add to the weights' cotangents, and compute that of the input.
      after = jnp.where(is_inside, jnp.maximum(value + self.bias, 0), 0)
      total = None
      for below, tap_row in _taps(i, self.stride):
        for right, tap_column in _taps(j, self.stride):
          tap = 3 * tap_row + tap_column
          cotangent = (near, far)[right][below]
          sums[tap] += cotangent * after
          total = gpu.add(total, cotangent * self.weights[tap])
      total = self.tokens.zeros() if total is None else total

      # Go back through ReLU to the bias and the input.
      total = jnp.where(after > 0, total, 0)
      sums[-1] += total
      own = slice(None), row * self.stride + i, column * self.stride + j
      pl.when(is_inside)(partial(self.tokens.store, self.dx_ref, own, total))
    return far, sums

  def _cotangents(self, row, column):
    """Returns those of a pixel of the result, and of the pixel below it."""
    pixels = (self._load(self.g_ref, row + i, column) for i in range(2))
    return tuple(jnp.where(is_inside, g, 0) for g, is_inside in pixels)

  def _load(self, ref, row, column):
    """Returns the nearest pixel of an image, and whether that is the one."""
    _, height, width, _ = ref.shape
    nearest = jnp.minimum(row, height - 1), jnp.minimum(column, width - 1)
    value = self.tokens.load(ref, (slice(None), *nearest))
    return value, (row < height) & (column < width)


def _taps(offset, stride):
  """Returns the taps by which a row of x is read; the same of a column.

  Args:
    offset: index of the row, less `stride` times that of a row of results.
    stride: stride of the convolution, 2 or more.

  Returns:
    A list of (0 for that row of results or 1 for the next one, tap).
  """
  taps = [(below, offset + 1 - below * stride) for below in range(2)]
  return [(below, tap) for below, tap in taps if 0 <= tap < 3]
