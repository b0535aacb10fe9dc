"""The backward pass of state fusion as two GPU kernels; see `gpu.strips`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import strips
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.fusion import (
  Window,
  image_stream,
  load_weights,
)
from spatial_mamba_kernels.gpu.plan import cut_to_fuse, cut_to_states
from spatial_mamba_kernels.gpu.strips import Stream
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.taps import (
  columns_read,
  sources,
)
from spatial_mamba_kernels.typing import Array


def weights_backward(h, weights, g, *, stencil, C=None) -> tuple[Array, ...]:
  """Returns the cotangents of the weights and, if C is given, of C.

  Args:
    h: [B, H, W, D], the states.
    weights: [T, D].
    g: [B, H, W, D], the cotangents of C * fused.
    stencil: its taps.
    C: [B, H, W], or None for 1.

  Returns:
    [G, T, D], to be summed over G; and for C [K, B, H, W], to be summed over K.
  """
  batch, height, width, channels = h.shape
  cut = cut_to_fuse(h.shape, stencil, h.dtype, g.dtype)
  h = gpu.pad_channels(h)
  blocks, taps = gpu.blocks(channels), len(weights)
  grid = (batch, cut.strips, cut.blocks)
  scratch = Stream.scratch("ring", cut.read, h.dtype, stencil.reach)
  scratch |= Stream.scratch("image", cut.strip, g.dtype, 0)
  operands = [h, gpu.parameters(weights), gpu.pad_channels(g)]
  results = [
    jax.ShapeDtypeStruct((*grid, taps, blocks * gpu.CHANNELS), jnp.float32)
  ]
  sums = -(-cut.strip // gpu.ROWS_SUMMED) * gpu.ROWS_SUMMED
  # A factor of 1 keeps LLVM from products of bfloat16, which ptxas spills on
  # B200.
  operands.append(jnp.ones(1) if C is None else C.astype(jnp.float32))
  if C is not None:
    shape = (blocks, batch, height, cut.strips, sums)
    results.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    shape = (gpu.ROWS_SUMMED, gpu.CHANNELS)
    scratch["products"] = plgpu.SMEM(shape, jnp.float32)
  dweights, *dC = strips.kernel(
    partial(_weights_kernel, stencil=stencil),
    h,
    cut,
    out_type=results,
    scratch_types=scratch,
    name="state_fusion_weights",
  )(*operands)
  dweights = dweights.reshape(-1, *dweights.shape[3:])[..., :channels]
  if not dC:
    return (dweights,)
  # The last strip ends where the image does.
  parts = [dC[0][..., strip, : cut.strip] for strip in range(cut.strips)]
  parts[-1] = parts[-1][..., cut.strips * cut.strip - width :]
  return dweights, jnp.concatenate(parts, axis=-1)


def _weights_kernel(
  h_ref, weights_ref, g_ref, C_ref, *refs, stencil, ring, ring_barriers=None,
  **scratch,
):  # fmt: skip
  dweights_ref, *dC_refs, program = refs
  rows = program.first_row, program.end_row
  streams = [
    Stream(program.rows_of(h_ref), ring, ring_barriers, rows, stencil.reach),
    image_stream(g_ref, program, scratch),
  ]
  dy_rows_ref = scratch["image"]
  weights, columns = load_weights(weights_ref, program), program.places()

  def add_row(row, sums):
    slots = stencil.slots(row, program.cut.height, strips.len_of(ring))
    window = Window(stencil, ring, slots, columns, program.cut.strip)
    dy, dfused = _observe_backward(row, dy_rows_ref, C_ref, program, dC_refs)

    # Accumulate the weights' cotangents; for C, fuse the states once more.
    sums, fused = list(sums), [None] * window.size
    for value, readers in window.values():
      for j, tap in readers:
        sums[tap] += dfused[j] * value
        if dC_refs:
          fused[j] = gpu.add(fused[j], weights[tap] * value)

    # Sum over channels for C.
    for dC_ref in dC_refs:
      out_ref = dC_ref.at[program.block, program.image, row, program.strip]
      values = [x * y for x, y in zip(dy, fused, strict=True)]
      gpu.store_sums(values, scratch["products"], out_ref)
    return sums

  sums = [gpu.zeros() for _ in weights]
  sums = strips.for_rows(rows, streams, add_row, sums)
  for tap, total in enumerate(sums):
    dweights_ref[
      program.image, program.strip, program.rows, tap, program.channels
    ] = total


def _observe_backward(row, dy_rows_ref, C_ref, program, has_C):
  """Returns a row's dy, and dy * C without another strip's columns."""
  cut, size = program.cut, program.cut.strip
  dy_ref = dy_rows_ref.at[row % strips.len_of(dy_rows_ref)]
  dy = [dy_ref[j].astype(jnp.float32) for j in range(size)]
  if has_C:
    c_ref = C_ref.at[program.image, row, pl.ds(program.column, size)]
    dfused = [c_ref[j] * x for j, x in enumerate(dy)]
  else:
    dfused = [C_ref[0] * x for x in dy]
  if cut.width % size:
    dfused = [jnp.where(program.is_own(j), x, 0) for j, x in enumerate(dfused)]
  return dy, dfused


def states_backward(g, weights, *, stencil, dtype, C=None):
  """Returns the cotangents of the states, [B, H, W, D]: `fuse` transposed.

  Args:
    g: [B, H, W, D], the cotangents of C * fused.
    weights: [T, D].
    stencil: its taps.
    dtype: of the result.
    C: [B, H, W], or None for 1.
  """
  channels = g.shape[-1]
  cut = cut_to_states(g.shape, stencil, dtype, g.dtype)
  g = gpu.pad_channels(g)
  row = (cut.read + 2 * len(stencil.distances), gpu.CHANNELS)
  dh = strips.kernel(
    partial(_states_kernel, stencil=stencil),
    g,
    cut,
    out_type=cut.result(g, dtype),
    scratch_types={
      **gpu.outlet("tile", (cut.strip, gpu.CHANNELS), dtype),
      "ring": plgpu.SMEM((stencil.window, *row), jnp.float32),
      **Stream.scratch("image", cut.read, g.dtype, 0),
    },
    name="state_fusion_states",
  )(
    g, gpu.parameters(weights), *(() if C is None else (C.astype(jnp.float32),))
  )
  return dh[..., :channels]


def _states_kernel(
  g_ref, weights_ref, *refs, stencil, ring, image, tile=None,
  image_barriers=None,
):  # fmt: skip
  *C_refs, dh_ref, program = refs
  cut, reach = program.cut, stencil.reach
  first = jnp.maximum(program.first_row - reach, 0)
  end = jnp.minimum(program.end_row + reach, cut.height)
  stream = Stream(
    program.rows_of(g_ref), image, image_barriers, (first, end), 0
  )
  weights, columns = load_weights(weights_ref, program), program.places()

  def put_row(row):
    """Puts a row of cotangents of fused states into the ring."""
    source_ref = image.at[row % strips.len_of(image)]
    target_ref = ring.at[row % stencil.window]
    values = [source_ref[j].astype(jnp.float32) for j in range(cut.read)]
    for C_ref in C_refs:
      values = [
        C_ref[program.image, row, program.first_read + j] * x
        for j, x in enumerate(values)
      ]
    for j, value in enumerate((*values, *_folded(values, stencil, program))):
      target_ref[j] = value

  stream.start()

  @pl.loop(first, program.end_row + reach)
  def _(row):
    requested = stream.request(row)

    # Add a row to the ring, while there are any.
    @pl.when(row < end)
    def _():
      stream.arrive(row)
      put_row(row)

    # Transpose the stencil for the row whose last neighbour this is.
    @pl.when(row - reach >= program.first_row)
    def _():
      total = _transpose_row(
        stencil, ring, row - reach, columns, weights, program
      )
      strips.store(total, tile, program.own_rows_of(dh_ref).at[row - reach])

    gpu.commit()
    stream.receive(row, requested)

  gpu.finish()


def _folded(values, stencil, program):
  """Yields the cotangents that replicas fold onto the border columns.

  For each side and each tap distance, that is the sum over the pixels that read
  a replica of the border column; zero if the strip has no border there.
  """
  cut = program.cut
  for at_border, inwards in (
    (program.column == 0, values),
    (program.column + cut.strip == cut.width, values[::-1]),
  ):
    for distance in stencil.distances:
      total = sum(inwards[1 : min(distance, cut.width)], inwards[0])
      yield jnp.where(at_border, total, 0)


def _transpose_row(stencil, ring_ref, row, columns, weights, program):
  """Returns the cotangents of a row of states, by column."""
  cut = program.cut
  total = [gpu.zeros() for _ in range(cut.strip)]
  for offset, taps in stencil.by_row.items():

    def add_row(source, total, taps=taps):
      row_ref = ring_ref.at[source % stencil.window]
      total = list(total)
      _transpose_columns(row_ref, taps, total, columns, weights, program)
      _add_folded(stencil, row_ref, taps, total, weights, cut)
      return total

    first, end = sources(row, offset, cut.height)
    total = lax.fori_loop(first, end, add_row, total)
  return total


def _transpose_columns(row_ref, taps, total, columns, weights, program):
  """Adds what the taps of one offset have read within the image.

  Args:
    row_ref: [W, 128], a row of cotangents of fused states.
    taps: of the offset.
    total: the cotangents of states, by column; changed.
    columns: where each column is in the row; see `Program.places`.
    weights: by tap.
    program: what the program computes.
  """
  size = program.cut.strip
  own_ref = row_ref.at[pl.ds(columns[0], size)]
  transposed = [(-column, tap) for column, tap in taps]
  for column, readers in columns_read(transposed, size):
    if 0 <= column < size:
      value = own_ref[column]
    else:
      value = jnp.where(program.is_inside(column), row_ref[columns[column]], 0)
    for j, tap in readers:
      total[j] += weights[tap] * value


def _add_folded(stencil, row_ref, taps, total, weights, cut):
  """Adds what the taps of one offset have read of replicas; see `_folded`."""
  for column, tap in taps:
    if column:
      side = stencil.distances.index(abs(column))
      if column > 0:
        side += len(stencil.distances)
      border = 0 if column < 0 else cut.strip - 1
      total[border] += weights[tap] * row_ref[cut.read + side]
