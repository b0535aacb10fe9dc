"""The backward pass of a depthwise 3x3 convolution as one GPU kernel.

XLA would read both images five times for the cotangents of the weights alone.
Here a thread goes through the rows of its channel, column by column. From the
nine pixels around a result it recomputes what it needs of the convolution; then
it adds the result's part to the weights' cotangents, and to three rows of the
input's cotangents, all in registers. The forward pass is a fusion of XLA, one
pass over memory.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.depthwise_conv import xla
from spatial_mamba_kernels.depthwise_conv.plans import (
  OFFSETS,
  TAPS,
  Form,
  cut,
)
from spatial_mamba_kernels.dispatch import Arrays, Results
from spatial_mamba_kernels.gpu import strips
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.strips import Program, Stream
from spatial_mamba_kernels.typing import Array

# Index of the tap without an offset.
CENTRE = TAPS.index((0, 0))


def run_forward(arrays: Arrays, *, save: bool, form: Form) -> Results:
  """Returns the result on one device; saves nothing."""
  del save
  # In float32, as the backward pass recomputes it: it is rounded once.
  convolve = partial(xla.shifted, stride=1, dtype=jnp.float32)
  return (form.forward(*arrays, convolve=convolve),)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Any, *, form: Form
) -> Arrays:
  """Returns the cotangents of x, [B, H, W, D], and of the rest, [G, S, D].

  The rest are the nine weights, the bias, and the columns of a projection.
  """
  del saved
  x, weights, *others = arrays
  channels, total = x.shape[-1], len(TAPS) + 1
  image, image_cut = gpu.pad_channels(x), cut(x, form)
  bias = others[0] if others else jnp.zeros(channels)
  operands = []
  if form.is_projected:
    g, numbers = g
    projection = others[1].astype(x.dtype)
    total += projection.shape[1]
    operands = [gpu.parameters(projection.T), numbers.astype(jnp.float32)]
  grid = (len(x), image_cut.strips, image_cut.blocks)
  dx, sums = strips.kernel(
    partial(_kernel, form=form),
    image,
    image_cut,
    out_type=[
      image_cut.result(image, x.dtype),
      jax.ShapeDtypeStruct(
        (*grid, total, gpu.blocks(channels) * gpu.CHANNELS), jnp.float32
      ),
    ],
    scratch_types={
      **gpu.outlet("tile", (image_cut.strip, gpu.CHANNELS), x.dtype),
      **Stream.scratch("ring", image_cut.read, x.dtype, 1),
      **Stream.scratch("flows", image_cut.read, g.dtype, 0),
    },
    name="depthwise_conv_backward",
  )(
    image,
    gpu.parameters(weights.reshape(len(TAPS), -1)),
    gpu.parameters(bias),
    gpu.pad_channels(g),
    *operands,
  )
  sums = sums.reshape(-1, *sums.shape[3:])[..., :channels]
  return dx[..., :channels], sums


def _kernel(
  x, weights, bias, g, *refs, form, ring, flows, ring_barriers=None,
  flows_barriers=None, tile=None,
):  # fmt: skip
  *projected, dx, sums, program = refs
  # Rows of results that read its rows.
  rows = (
    jnp.maximum(program.first_row - 1, 0),
    jnp.minimum(program.end_row + 1, program.cut.height),
  )
  streams = [
    Stream(program.rows_of(x), ring, ring_barriers, rows, 1),
    Stream(program.rows_of(g), flows, flows_barriers, rows, 0),
  ]
  own, channels = program.own_rows_of(dx), program.channels
  projection, numbers = [], None
  if projected:
    matrix, numbers = projected
    projection = [matrix[place, channels] for place in range(matrix.shape[0])]
    numbers = program.numbers_of(numbers)
  walk = _Walk(
    form,
    program,
    [weights[tap, channels] for tap in range(len(TAPS))],
    bias[channels],
    projection,
    numbers,
  )

  def step(row, carry):
    above, *rest = walk.add_row(row, ring, flows, *carry)

    @pl.when(row > program.first_row)
    def _():
      strips.store(above, tile, own.at[row - 1])

    return rest

  zeros = [gpu.zeros() for _ in range(program.cut.strip)]
  totals = [gpu.zeros() for _ in range(sums.shape[-2])]
  last, _, totals = strips.for_rows(rows, streams, step, [zeros, zeros, totals])

  # No row follows the last one to finish it.
  @pl.when(program.end_row == program.cut.height)
  def _():
    strips.store(last, tile, own.at[program.cut.height - 1])

  for place, total in enumerate(totals):
    sums[program.image, program.strip, program.rows, place, channels] = total
  gpu.finish()


class _Walk(NamedTuple):
  """The step of `_kernel` for one row, and what it takes.

  Attributes:
    form: of the convolution.
    program: what the program computes.
    weights: a vector of channels for each of the taps.
    bias: a vector of channels.
    projection: a vector of channels for each column of the projection.
    numbers: reference to the cotangents of what is projected, [H, W, P], or
      None.
  """

  form: Form
  program: Program
  weights: list[Array]
  bias: Array
  projection: list[Array]
  numbers: Any

  def add_row(self, row, ring, flows, above, here, totals):
    """Adds the part of a row of results to all cotangents.

    Args:
      row: index of the row.
      ring: reference to rows of the input: this one and its neighbours.
      flows: reference to rows of the results' cotangents.
      above: the input's cotangents in the row above, by column.
      here: the same in this row.
      totals: the cotangents of weights, bias and projection.

    Returns:
      The input's cotangents in the row above, which are then complete, in this
      row and in the row below; and `totals`.
    """
    program, totals = self.program, list(totals)
    size = program.cut.strip
    sums = {-1: list(above), 0: list(here), 1: [gpu.zeros()] * size}
    pixel = self._pixels(row, ring)
    cotangents = program.columns_of(flows.at[row % strips.len_of(flows)])
    numbers_at = self._numbers(row)
    is_own = (row >= program.first_row) & (row < program.end_row)
    back = list(self.weights)
    if self.form.has_residual:
      back[CENTRE] += 1
    # With the columns beside the strip, whose results read its pixels.
    for j in range(-1, size + 1):
      is_beside = not 0 <= j < size
      y, slope = self._result(pixel, j)
      flow = cotangents(j)[...].astype(jnp.float32)
      numbers = numbers_at(j)
      for number, weight in zip(numbers, self.projection, strict=True):
        flow += number * weight
      flow *= slope
      if is_beside:
        flow = jnp.where(program.is_inside(j), flow, 0)
      for weight, (offset, column) in zip(back, TAPS, strict=True):
        if 0 <= j + column < size:
          sums[offset][j + column] += weight * flow
      if not is_beside:
        is_counted = is_own & program.is_own(j)
        flow = jnp.where(is_counted, flow, 0)
        terms = [
          *(pixel(offset, j + column) * flow for offset, column in TAPS),
          flow,
          *(jnp.where(is_counted, number, 0) * y for number in numbers),
        ]
        totals = [a + b for a, b in zip(totals, terms, strict=True)]
    return *sums.values(), totals

  def _pixels(self, row, ring):
    """Returns (row offset, column) -> input, zero beyond the image."""
    program, rows = self.program, {}
    for offset in OFFSETS:
      nearest = jnp.clip(row + offset, 0, program.cut.height - 1)
      place = ring.at[nearest % strips.len_of(ring)]
      rows[offset] = program.columns_of(place), nearest == row + offset

    @functools.cache
    def pixel(offset, j):
      column, is_inside = rows[offset]
      value = column(j)[...].astype(jnp.float32)
      if not 0 <= j < program.cut.strip:
        is_inside &= program.is_inside(j)
      elif not offset:
        return value
      return jnp.where(is_inside, value, 0)

    return pixel

  def _numbers(self, row):
    """Returns column -> cotangents of what its result is projected to."""
    if self.numbers is None:
      return lambda j: []
    column = self.program.columns_of(self.numbers.at[row])
    places = range(len(self.projection))
    return lambda j: [column(j)[place] for place in places]

  def _result(self, pixel, j) -> tuple[Any, Any]:
    """Returns column j after SiLU or None, and the derivative of SiLU or 1."""
    if not self.form.has_silu:
      return None, 1
    total = self.bias
    for weight, (offset, column) in zip(self.weights, TAPS, strict=True):
      total += weight * pixel(offset, j + column)
    gate = gpu.sigmoid(total)
    return total * gate, gate * (1 + total * (1 - gate))
