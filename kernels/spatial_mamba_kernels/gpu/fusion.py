"""State fusion as GPU kernels; see `gpu.strips` for how they walk."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import strips
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.plan import cut_to_fuse, cut_to_states
from spatial_mamba_kernels.gpu.strips import Stream
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.taps import (
  columns_read,
  sources,
)
from spatial_mamba_kernels.typing import Array


def fuse(h, weights, *, stencil, dtype, observe=None):
  """Fuses states, and may observe them.

  Args:
    h: [B, H, W, D], the states.
    weights: [T, D].
    stencil: its taps.
    dtype: of the result.
    observe: (C [B, H, W], D [D], u [B, H, W, D]), for C * fused + D * u.

  Returns:
    [B, H, W, D].
  """
  channels = h.shape[-1]
  cut = cut_to_fuse(
    h.shape, stencil, h.dtype, observe[2].dtype if observe else h.dtype
  )
  h = gpu.pad_channels(h)
  operands = [h, gpu.parameters(weights)]
  scratch = {
    **gpu.outlet("tile", (cut.strip, gpu.CHANNELS), dtype),
    **Stream.scratch("ring", cut.read, h.dtype, stencil.reach),
  }
  if observe:
    C, D, u = observe
    operands += [C.astype(jnp.float32), gpu.parameters(D[None])]
    operands.append(gpu.pad_channels(u))
    scratch |= Stream.scratch("image", cut.strip, u.dtype, 0)
  y = strips.kernel(
    partial(_fuse_kernel, stencil=stencil),
    h,
    cut,
    out_type=cut.result(h, dtype),
    scratch_types=scratch,
    name="state_fusion_forward",
  )(*operands)
  return y[..., :channels]


def _fuse_kernel(
  h, weights, *refs, stencil, ring, tile=None, ring_barriers=None, **scratch
):  # fmt: skip
  *observed, y, program = refs
  rows = program.first_row, program.end_row
  states = Stream(program.rows_of(h), ring, ring_barriers, rows, stencil.reach)
  streams = [states]
  weights, places = _load_weights(weights, program), program.places()

  def observe(row, fused):
    return fused

  if observed:
    streams.append(_image_of(observed[2], program, scratch))
    observe = partial(_observe, *observed, program, scratch["image"])

  def fuse_row(row, _):
    slots = stencil.slots(row, program.cut.height, strips.len_of(ring))
    fused = _fuse_columns(
      stencil, ring, slots, places, weights, program.cut.strip
    )
    fused = observe(row, fused)
    strips.store(fused, tile, program.own_rows_of(y).at[row])

  strips.for_rows(rows, streams, fuse_row, None)
  gpu.finish()


def _image_of(image, program, scratch):
  """A stream of another image's rows, one at a time."""
  return Stream(
    program.own_rows_of(image),
    scratch["image"],
    scratch.get("image_barriers"),
    (program.first_row, program.end_row),
    0,
  )


def _observe(C, D, u, program, image, row, fused):
  """C * fused + D * u for a row; the rows of `u` come through `image`."""
  del u
  skip, x = D[0, program.channels], image.at[row % strips.len_of(image)]
  c = C.at[program.image, row, pl.ds(program.column, len(fused))]
  return [
    c[j] * value + skip * x[j].astype(jnp.float32)
    for j, value in enumerate(fused)
  ]


def _load_weights(weights, program):
  return [weights[t, program.channels] for t in range(weights.shape[0])]


def _fuse_columns(stencil, ring, slots, places, weights, size):
  """A row of fused states, a vector of channels for each column."""
  fused: list[Any] = [None] * size
  for value, readers in _neighbours(stencil, ring, slots, places, size):
    for j, place in readers:
      fused[j] = gpu.add(fused[j], weights[place] * value)
  return fused


def _neighbours(stencil, ring, slots, places, size):
  """All that a row of pixels reads: (states, by whom); see `columns_read`."""
  for offset, taps in stencil.by_row.items():
    row = ring.at[slots[offset]]
    own = row.at[pl.ds(places[0], size)]
    for column, readers in columns_read(taps, size):
      inside = 0 <= column < size
      value = own[column] if inside else row[places[column]]
      yield value.astype(jnp.float32), readers


def weights_backward(h, weights, g, *, stencil, C=None) -> tuple[Array, ...]:
  """The cotangents of the weights, and of the observation.

  Args:
    h: [B, H, W, D], the states.
    weights: [T, D].
    g: [B, H, W, D], the cotangents of what was observed, C * fused.
    stencil: its taps.
    C: [B, H, W], or None for 1.

  Returns:
    [G, T, D], to be summed over G; and, if it is given, of C, [K, B, H, W], to
    be summed over K.
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
  # A factor keeps LLVM from products of bfloat16, which ptxas spills on B200.
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
  h, weights, g, C, *refs, stencil, ring, ring_barriers=None, **scratch
):
  dweights, *dC, program = refs
  cut, size = program.cut, program.cut.strip
  rows = program.first_row, program.end_row
  streams = [
    Stream(program.rows_of(h), ring, ring_barriers, rows, stencil.reach),
    _image_of(g, program, scratch),
  ]
  image = scratch["image"]
  weights, places = _load_weights(weights, program), program.places()

  def add_row(row, sums):
    slots = stencil.slots(row, cut.height, strips.len_of(ring))
    dy = image.at[row % strips.len_of(image)]
    dy = [dy[j].astype(jnp.float32) for j in range(size)]
    if dC:
      c = C.at[program.image, row, pl.ds(program.column, size)]
      dfused = [c[j] * x for j, x in enumerate(dy)]
    else:
      dfused = [C[0] * x for x in dy]
    if cut.width % size:
      dfused = [
        jnp.where(program.is_own(j), x, 0) for j, x in enumerate(dfused)
      ]
    sums, fused = list(sums), [None] * size
    for value, readers in _neighbours(stencil, ring, slots, places, size):
      for j, place in readers:
        sums[place] += dfused[j] * value
        if dC:
          fused[j] = gpu.add(fused[j], weights[place] * value)
    if dC:
      row_of = dC[0].at[program.block, program.image, row, program.strip]
      values = [x * y for x, y in zip(dy, fused, strict=True)]
      gpu.store_sums(values, scratch["products"], row_of)
    return sums

  sums = [gpu.zeros() for _ in weights]
  sums = strips.for_rows(rows, streams, add_row, sums)
  for place, total in enumerate(sums):
    dweights[
      program.image, program.strip, program.rows, place, program.channels
    ] = total


def states_backward(g, weights, *, stencil, dtype, C=None):
  """The cotangents of states: the transpose of `fuse`.

  Args:
    g: [B, H, W, D], the cotangents of what was observed, C * fused.
    weights: [T, D].
    stencil: its taps.
    dtype: of the result.
    C: [B, H, W], or None for 1.

  Returns:
    [B, H, W, D].
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
  g, weights, *refs, stencil, ring, image, tile=None, image_barriers=None
):
  *C, dh, program = refs
  cut, reach = program.cut, stencil.reach
  first = jnp.maximum(program.first_row - reach, 0)
  end = jnp.minimum(program.end_row + reach, cut.height)
  coming = Stream(program.rows_of(g), image, image_barriers, (first, end), 0)
  weights, places = _load_weights(weights, program), program.places()

  def take_row(row):
    source = image.at[row % strips.len_of(image)]
    target = ring.at[row % stencil.window]
    values = [source[j].astype(jnp.float32) for j in range(cut.read)]
    if C:
      values = [
        C[0][program.image, row, program.first_read + j] * x
        for j, x in enumerate(values)
      ]
    for j, value in enumerate((*values, *_folded(values, stencil, program))):
      target[j] = value

  coming.start()

  @pl.loop(first, program.end_row + reach)
  def _(row):
    requested = coming.request(row)

    @pl.when(row < end)
    def _():
      coming.arrive(row)
      take_row(row)

    @pl.when(row - reach >= program.first_row)
    def _():
      total = _transpose_row(
        stencil, ring, row - reach, places, weights, program
      )
      strips.store(total, tile, program.own_rows_of(dh).at[row - reach])

    gpu.commit()
    coming.receive(row, requested)

  gpu.finish()


def _folded(values, stencil, program):
  """What replication folds onto the first and the last column of an image.

  Of the pixels that see the border column in place of one beyond it, the sum
  for each distance; zero where the strip has no border.
  """
  cut = program.cut
  for at_border, inwards in (
    (program.column == 0, values),
    (program.column + cut.strip == cut.width, values[::-1]),
  ):
    for distance in stencil.distances:
      total = sum(inwards[1 : min(distance, cut.width)], inwards[0])
      yield jnp.where(at_border, total, 0)


def _transpose_row(stencil, ring, row, places, weights, program):
  """The cotangents of a row of states, a vector of channels for each column."""
  cut = program.cut
  total = [gpu.zeros() for _ in range(cut.strip)]
  for offset, taps in stencil.by_row.items():

    def add_row(source, total, taps=taps):
      cotangents = ring.at[source % stencil.window]
      return _transpose_columns(
        stencil, cotangents, taps, total, places, weights, program
      )

    first, end = sources(row, offset, cut.height)
    total = lax.fori_loop(first, end, add_row, total)
  return total


def _transpose_columns(
  stencil, cotangents, taps, total, places, weights, program
):
  """Adds what flows back from one row of pixels by the taps of one offset."""
  cut, total = program.cut, list(total)
  own = cotangents.at[pl.ds(places[0], cut.strip)]
  transposed = [(-column, place) for column, place in taps]
  for column, readers in columns_read(transposed, cut.strip):
    if 0 <= column < cut.strip:
      value = own[column]
    else:
      value = jnp.where(
        program.is_inside(column), cotangents[places[column]], 0
      )
    for j, place in readers:
      total[j] += weights[place] * value
  for column, place in taps:
    if column:
      side = stencil.distances.index(abs(column))
      if column > 0:
        side += len(stencil.distances)
      border = 0 if column < 0 else cut.strip - 1
      total[border] += weights[place] * cotangents[cut.read + side]
  return total
