"""The backward pass of a depthwise 3x3 convolution as one GPU kernel.

For the cotangents of its weights alone XLA would read both images five times.
A thread walks over the rows of its channel, column by column: of the nine
pixels around one it makes what it needs of the convolution again, and what
flows back from that pixel it adds to the sums of the weights, and to three rows
of the input's cotangents that stay in registers. Forward the convolution is a
fusion of XLA's, one pass over memory.
"""

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.by_platform import Arrays, Dimensions, Kernel, Passes
from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.gpu_device import device, is_default
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.state_fusion import gpu_strips as strips
from spatial_mamba_kernels.state_fusion.gpu_strips import Cut, Program, Stream
from spatial_mamba_kernels.typing import Array

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
PLAIN_DIMENSIONS = Dimensions(
  arguments=(IMAGE, (WHOLE, WHOLE, CHANNELS)), result=IMAGE, saved=()
)
DIMENSIONS = Dimensions(
  arguments=(*PLAIN_DIMENSIONS.arguments, (CHANNELS,)), result=IMAGE, saved=()
)

OFFSETS = (-1, 0, 1)
TAPS = tuple(itertools.product(OFFSETS, OFFSETS))
CENTRE = TAPS.index((0, 0))


class Form(NamedTuple):
  """What a convolution is part of.

  Attributes:
    forward: (x, kernel, bias if any, convolve=) -> result.
    has_residual: its input is added to it.
    has_silu: of which the result is.
  """

  forward: Callable[..., Array]
  has_residual: bool = False
  has_silu: bool = False

  @property
  def reach(self) -> int:
    """Columns to either side that a cotangent of the input depends on."""
    return 2 if self.has_silu else 1


PLAIN = Form(xla.plain)
RESIDUAL = Form(xla.residual, has_residual=True)
SILU = Form(xla.activated, has_silu=True)


def kernel(form: Form) -> Kernel:
  """The kernel for one of the forms."""
  return Kernel(
    partial(plan, form=form),
    Passes(partial(run_forward, form=form), partial(run_backward, form=form)),
    _finish,
    (IMAGE, (BATCH, WHOLE, CHANNELS)),
  )


def plan(arrays: Arrays, *, form: Form) -> None:
  """Raises NotImplementedError where the kernel cannot serve."""
  gpu.check_served(arrays)
  x, *_ = arrays
  if not device().tma and x.shape[-1] % gpu.CHANNELS:
    raise NotImplementedError(
      f"mosaic_gpu would pad both images of {x.shape[-1]} channels to blocks"
      f" of {gpu.CHANNELS} here"
    )
  # What XLA keeps of it elsewhere is decided in tracing.
  if form.has_silu and not is_default():
    raise NotImplementedError(
      "mosaic_gpu makes the convolution again: make a GPU JAX's default device"
    )
  cut(x, form)


def cut(x: Any, form: Form) -> Cut:
  """How images like these are cut."""
  size = gpu.CHANNELS * jnp.dtype(x.dtype).itemsize

  def bytes_of(strip, read):
    rows = (Stream.places(1) + Stream.places(0)) * read
    return (rows + strip) * size

  # Without a TMA rows that come wait in registers, too.
  columns = strips.MOST_COLUMNS // (1 if device().tma else 2)
  return strips.cut(x.shape, form.reach, bytes_of, columns=columns)


def run_forward(arrays: Arrays, *, save: bool, form: Form) -> Arrays:
  """The result on one device; there is nothing to save."""
  del save
  x, *rest = arrays
  # So that it is rounded once, as the backward pass makes it again.
  convolve = partial(xla.shifted, stride=1)
  y = form.forward(x.astype(jnp.float32), *rest, convolve=convolve)
  return (y.astype(x.dtype),)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Array, *, form: Form
) -> Arrays:
  """Cotangents [B, H, W, D] of x, and [G, 9 + 1, D] of weights and bias."""
  del saved
  x, weights, *bias = arrays
  channels = x.shape[-1]
  cut_x, padded = cut(x, form), gpu.pad_channels(x)
  total = len(TAPS) + 1
  grid = (len(x), cut_x.strips, cut_x.blocks)
  dx, sums = strips.kernel(
    partial(_kernel, form=form),
    padded,
    cut_x,
    out_type=[
      jax.ShapeDtypeStruct(padded.shape, x.dtype),
      jax.ShapeDtypeStruct(
        (*grid, total, gpu.blocks(channels) * gpu.CHANNELS), jnp.float32
      ),
    ],
    scratch_types={
      **gpu.outlet("tile", (cut_x.strip, gpu.CHANNELS), x.dtype),
      **Stream.scratch("ring", cut_x.read, x.dtype, 1),
      **Stream.scratch("image", cut_x.read, g.dtype, 0),
    },
    name="depthwise_conv_backward",
  )(
    padded,
    gpu.parameters(weights.reshape(len(TAPS), -1)),
    gpu.parameters(bias[0] if bias else jnp.zeros(channels)),
    gpu.pad_channels(g),
  )
  sums = sums.reshape(-1, *sums.shape[3:])[..., :channels]
  return dx[..., :channels], sums


def _finish(arrays, sums):
  dx, sums = sums
  *dweights, dbias = jnp.sum(sums, axis=0)
  cotangents = dx, jnp.stack(dweights).reshape(arrays[1].shape), dbias
  return cotangents[: len(arrays)]


def _kernel(
  x, weights, bias, g, dx, sums, program, *, form, ring, image, tile=None,
  ring_barriers=None, image_barriers=None,
):  # fmt: skip
  # Rows from which something flows back to its own.
  rows = (
    jnp.maximum(program.first_row - 1, 0),
    jnp.minimum(program.end_row + 1, program.cut.height),
  )
  streams = [
    Stream(program.rows_of(x), ring, ring_barriers, rows, 1),
    Stream(program.rows_of(g), image, image_barriers, rows, 0),
  ]
  own, channels = program.own_rows_of(dx), program.channels
  walk = _Walk(
    form,
    program,
    [weights[tap, channels] for tap in range(len(TAPS))],
    bias[channels],
  )

  def step(row, carry):
    above, *rest = walk.add_row(row, ring, image, *carry)

    @pl.when(row > program.first_row)
    def _():
      strips.store(above, tile, own.at[row - 1])

    return rest

  zeros = [gpu.zeros() for _ in range(program.cut.strip)]
  totals = [gpu.zeros() for _ in range(len(TAPS) + 1)]
  last, _, totals = strips.for_rows(rows, streams, step, [zeros, zeros, totals])

  # No row comes after it that would finish it.
  @pl.when(program.end_row == program.cut.height)
  def _():
    strips.store(last, tile, own.at[program.cut.height - 1])

  for place, total in enumerate(totals):
    sums[program.image, program.strip, program.rows, place, channels] = total
  gpu.finish()


class _Walk(NamedTuple):
  """How a program goes through a row; see `_kernel`.

  Attributes:
    form: of the convolution.
    program: what it computes.
    weights: a vector of channels for each of the taps.
    bias: a vector of channels.
  """

  form: Form
  program: Program
  weights: list[Array]
  bias: Array

  def add_row(self, row, ring, image, above, here, totals):
    """Adds what flows back from a row of results.

    Args:
      row: that one.
      ring: with it and those next to it, of the input.
      image: with its cotangents.
      above: for each column, what has flowed back to the row above.
      here: the same of this row.
      totals: what has flowed back to the weights and to the bias.

    Returns:
      The same of the row above, which is finished with it, of this row, of the
      row below, and of weights and bias.
    """
    program, totals = self.program, list(totals)
    size = program.cut.strip
    sums = {-1: list(above), 0: list(here), 1: [gpu.zeros()] * size}
    pixel = self._pixels(row, ring)
    cotangents = program.columns_of(image.at[row % strips.len_of(image)])
    is_own = (row >= program.first_row) & (row < program.end_row)
    back = list(self.weights)
    if self.form.has_residual:
      back[CENTRE] += 1
    # Of the strips beside it, results that have read its pixels.
    for j in range(-1, size + 1):
      is_beside = not 0 <= j < size
      slope = self._slope(pixel, j) if self.form.has_silu else 1
      flow = slope * cotangents(j)
      if is_beside:
        flow = jnp.where(program.is_inside(j), flow, 0)
      for weight, (offset, column) in zip(back, TAPS, strict=True):
        if 0 <= j + column < size:
          sums[offset][j + column] += weight * flow
      if not is_beside:
        flow = jnp.where(is_own & program.is_own(j), flow, 0)
        for tap, (offset, column) in enumerate(TAPS):
          totals[tap] += pixel(offset, j + column) * flow
        totals[-1] += flow
    return *sums.values(), totals

  def _pixels(self, row, ring):
    """(row offset, column) -> the input there, zeros beyond the image."""
    program, rows = self.program, {}
    for offset in OFFSETS:
      nearest = jnp.clip(row + offset, 0, program.cut.height - 1)
      place = ring.at[nearest % strips.len_of(ring)]
      rows[offset] = program.columns_of(place), nearest == row + offset

    @functools.cache
    def pixel(offset, j):
      column, is_inside = rows[offset]
      if not 0 <= j < program.cut.strip:
        is_inside &= program.is_inside(j)
      elif not offset:
        return column(j)
      return jnp.where(is_inside, column(j), 0)

    return pixel

  def _slope(self, pixel, j):
    """SiLU's derivative at what the convolution makes of column j."""
    result = self.bias
    for weight, (offset, column) in zip(self.weights, TAPS, strict=True):
      result += weight * pixel(offset, j + column)
    gate = gpu.sigmoid(result)
    return gate * (1 + result * (1 - gate))
