"""The cotangents of an MLP's weights as a GPU kernel.

They are sums over all tokens. So a warpgroup has some of the hidden units for
good, and goes through tokens: what it makes of its units stays in registers,
and so do the sums until the end. Units are the rows there and tokens the
columns, because from registers tensor cores take only what is on the left.

Where all hidden units are in one program the tokens' cotangents are made too.
That takes units of both warpgroups, which meet in shared memory; they take
turns at it, a tile of tokens each.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.mlp.gpu_gelu import gelu
from spatial_mamba_kernels.mlp.gpu_products import (
  EXCHANGED,
  TOKENS,
  WARPGROUPS,
  add_product,
  compiler_params,
  product,
  scaled,
  sum_rows,
  tiles,
)
from spatial_mamba_kernels.typing import Array

# Hidden units multiplied at a time: the rows of Hopper's matrix products.
UNITS = 64
# Tokens multiplied at a time. With more there are too few registers.
PIECE = 32
# Of a thread's registers, so many are for sums.
SUMS = 128
# Tiles of tokens on their way into shared memory.
STAGES = 3
# Tiles worth a program's sums.
LEAST_TILES = 8


def _chunks(channels):
  """How many times 64 units a warpgroup has."""
  return SUMS // channels


def _units_of_program(channels):
  return WARPGROUPS * _chunks(channels) * UNITS


def serves(channels: int, hidden: int) -> bool:
  """Whether so many channels and hidden units are shared out evenly."""
  return channels in (64, 128) and hidden % _units_of_program(channels) == 0


def is_whole(channels: int, hidden: int) -> bool:
  """Whether a program has all hidden units, and room for their cotangents."""
  return channels == 64 and hidden == _units_of_program(channels)


def cotangents(
  x: Array, dy: Array, scales: Array, w1: Array, b1: Array, w2: Array
) -> tuple[Array, ...]:
  """Those of w1, b1 and w2, in float32; then of x and b2, if `is_whole`.

  Args:
    x: [T, C], with T a multiple of 64.
    dy: [T, C].
    scales: [T].
    w1: [C, F], as `serves` says.
    b1: [F].
    w2: [F, C].
  """
  tokens, channels = x.shape
  hidden = w1.shape[1]
  chunks = _chunks(channels)
  parts = hidden // _units_of_program(channels)
  splits = gpu.split(tokens // TOKENS, parts, least=LEAST_TILES)
  sums = jax.ShapeDtypeStruct((splits, hidden, channels), jnp.float32)
  results = [sums, sums, jax.ShapeDtypeStruct(sums.shape[:2], jnp.float32)]
  scratch, name = {}, "mlp_weights"
  if is_whole(channels, hidden):
    name = "mlp_backward_whole"
    shape = tokens // TOKENS, channels
    results += [
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    scratch = {
      "hidden": tiles(PIECE, WARPGROUPS, WARPGROUPS, chunks, UNITS, TOKENS),
      "made": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=WARPGROUPS),
      "read": plgpu.Barrier(num_arrivals=1, num_barriers=WARPGROUPS),
      "exchanged": plgpu.SMEM((WARPGROUPS, EXCHANGED), jnp.float32),
    }
  dw1, dw2, db1, *others = plgpu.kernel(
    partial(_kernel, splits, parts),
    out_type=results,
    scratch_types={
      "images": tiles(PIECE, STAGES, 2, TOKENS, channels),
      "scale_tiles": plgpu.SMEM((STAGES, TOKENS), jnp.float32),
      "come": plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
      "used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
      "weights": tiles(PIECE, WARPGROUPS, chunks, 2, UNITS, channels),
      "biases": plgpu.SMEM((WARPGROUPS, chunks, UNITS), jnp.float32),
      "weights_come": plgpu.Barrier(num_arrivals=3 * WARPGROUPS * chunks),
      **scratch,
    },
    grid=(splits * parts,),
    grid_names=("program",),
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=compiler_params(),
  )(
    x,
    dy,
    scales,
    w1.T.astype(jnp.bfloat16),
    w2.astype(jnp.bfloat16),
    b1.astype(jnp.float32),
  )
  weights = jnp.sum(dw1, 0).T, jnp.sum(db1, 0), jnp.sum(dw2, 0)
  if not others:
    return weights
  dx, db2 = others
  return *weights, dx, jnp.sum(db2, 0)


def _kernel(
  splits, parts, x, dy, scales, w1, w2, b1, dw1, dw2, db1, *to_input, images,
  scale_tiles, come, used, weights, biases, weights_come, **scratch,
):  # fmt: skip
  me, program = lax.axis_index("warpgroup"), lax.axis_index("program")
  # Neighbours have the same tokens, which they find in the cache.
  split, part = lax.div(program, parts), lax.rem(program, parts)
  chunks = range(weights.shape[1])
  all_tiles = len(x) // TOKENS
  first = lax.div(split * all_tiles, splits)
  end = lax.div((split + 1) * all_tiles, splits)

  def units_of(group, chunk):
    index = (part * WARPGROUPS + group) * len(chunks) + chunk
    return pl.ds(index * UNITS, UNITS)

  def fetch(i):
    slot, own = lax.rem(i, STAGES), pl.ds(i * TOKENS, TOKENS)
    for source, tile in (
      (x, images.at[slot, 0]),
      (dy, images.at[slot, 1]),
      (scales, scale_tiles.at[slot]),
    ):
      plgpu.copy_gmem_to_smem(source.at[own], tile, come.at[slot])

  @pl.when(me == 0)
  def _():
    for group, chunk in itertools.product(range(WARPGROUPS), chunks):
      for source, tile in (
        (w1, weights.at[group, chunk, 0]),
        (w2, weights.at[group, chunk, 1]),
        (b1, biases.at[group, chunk]),
      ):
        own = units_of(group, chunk)
        plgpu.copy_gmem_to_smem(source.at[own], tile, weights_come)
    last = jnp.minimum(first + STAGES, end)
    lax.fori_loop(first, last, lambda i, _: fetch(i), None)

  rows, columns = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
  units = [units_of(me, chunk) for chunk in chunks]
  plgpu.barrier_wait(weights_come)

  def run(to_w1, to_w2):
    def step(i, sums):
      slot, turn = lax.rem(i, STAGES), lax.rem(i, WARPGROUPS)
      plgpu.barrier_wait(come.at[slot])
      if to_input:
        _wait_for_turn(i - first, turn, **scratch)

      # Unrolled, it would take more registers.
      def add(piece, sums):
        own, sums = pl.ds(piece * PIECE, PIECE), list(sums)
        tokens, cotangents = (images.at[slot, j, own] for j in range(2))
        for chunk in chunks:
          w1_tile, w2_tile = (weights.at[me, chunk, j] for j in range(2))
          h = product(w1_tile, tokens.transpose((1, 0)))
          bias = gpu.load(biases.at[me, chunk], rows)
          value, slope = gelu(h + lax.broadcast_in_dim(bias, h.shape, (0,)))
          scale = gpu.load(scale_tiles.at[slot, own], columns)
          g = scaled(value, scale, axis=1).astype(jnp.bfloat16)
          add_product(to_w2[chunk], g, cotangents)
          dg = product(w2_tile, cotangents.transpose((1, 0)))
          dh = scaled(slope * dg, scale, axis=1)
          sums[chunk] += jnp.sum(dh, axis=1)
          dh = dh.astype(jnp.bfloat16)
          if to_input:
            scratch["hidden"][turn, me, chunk, :, own] = dh
          add_product(to_w1[chunk], dh, tokens)
        # Before a loop's end, where registers may be moved.
        plgpu.wgmma_wait(0)
        return tuple(sums)

      sums = lax.fori_loop(0, TOKENS // PIECE, add, sums)
      if to_input:
        _sum_units(
          i, turn, images.at[slot, 1], scale_tiles.at[slot],
          weights, *to_input, **scratch,
        )  # fmt: skip
      plgpu.barrier_arrive(used.at[slot])
      after = i - 1 + STAGES

      # Of the step before, which the other warpgroup has long been done with.
      @pl.when((me == 0) & (i > first) & (after < end))
      def _():
        plgpu.barrier_wait(used.at[lax.rem(after, STAGES)])
        fetch(after)

      return sums

    zeros = plgpu.layout_cast(jnp.zeros((UNITS,), jnp.float32), rows)
    sums = lax.fori_loop(first, end, step, tuple(zeros for _ in chunks))
    for chunk, own in enumerate(units):
      gpu.store(dw1.at[split, own], to_w1[chunk][...])
      gpu.store(dw2.at[split, own], to_w2[chunk][...])
      gpu.store(db1.at[split, own], sums[chunk])

  total = plgpu.WGMMAAccumulatorRef((UNITS, x.shape[1]), jnp.float32)
  pl.run_scoped(run, [total for _ in chunks], [total for _ in chunks])


def _wait_for_turn(i, turn, *, read, **_):
  """Until the units of two tiles ago have been read."""

  @pl.when(i >= WARPGROUPS)
  def _():
    plgpu.barrier_wait(read.at[turn])


def _sum_units(
  index, turn, cotangents, scales, weights, dx, db2, *, hidden, made, read,
  exchanged,
):  # fmt: skip
  """The cotangents of a tile's tokens, and what they give to b2.

  Made by the warpgroup whose turn it is, once both have stored those of their
  hidden units.
  """
  me = lax.axis_index("warpgroup")
  plgpu.commit_smem()
  plgpu.barrier_arrive(made.at[turn])

  @pl.when(me == turn)
  def _():
    scale = gpu.load(scales, plgpu.Layout.WGMMA.reduce(1))
    tile, own = hidden.at[turn], pl.ds(index * TOKENS, TOKENS)
    plgpu.barrier_wait(made.at[turn])

    # In pieces for the sake of registers, as above.
    def add(piece, _):
      columns = pl.ds(piece * PIECE, PIECE)

      def multiply(total):
        for part in itertools.product(*map(range, weights.shape[:2])):
          w1_tile = weights.at[(*part, 0, slice(None), columns)]
          plgpu.wgmma(total, tile.at[part].transpose((1, 0)), w1_tile)
        return total[...]

      total = pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((TOKENS, PIECE))
      )
      # The way through shared memory would take more of them, too.
      gpu.store(dx.at[own, columns], total.astype(dx.dtype))
      dy = gpu.load(cotangents.at[:, columns], plgpu.Layout.WGMMA)
      dy = scaled(dy.astype(jnp.float32), scale)
      gpu.store(db2.at[index, columns], sum_rows(dy, exchanged.at[me]))

    lax.fori_loop(0, cotangents.shape[1] // PIECE, add, None)
    plgpu.barrier_arrive(read.at[turn])
