"""The cotangents of an MLP's weights as a GPU kernel.

They are sums over all tokens. A warpgroup therefore keeps the same hidden units
and goes through the tokens: the activations of its units and the sums stay in
registers. Units are the rows and tokens the columns of its matrices, because
tensor cores take only the left operand from registers.

If a program has all hidden units, it computes the cotangents of the tokens too.
These are sums over the units of both warpgroups, which exchange them in shared
memory. The warpgroups take turns, one tile of tokens each.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

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
from spatial_mamba_kernels.mlp.gpu_weights_refs import (
  Inputs,
  Outputs,
  Scratch,
  ToInput,
)
from spatial_mamba_kernels.typing import Array

# Hidden units multiplied at a time: the rows of Hopper's matrix products.
UNITS = 64
# Tokens multiplied at a time. With more there are too few registers.
PIECE = 32
# Registers of a thread that hold sums.
SUMS = 128
# Slots for tiles of tokens in shared memory, loaded ahead.
STAGES = 3
# Tiles that a program has at least; with fewer, more sums would be written.
LEAST_TILES = 8


def _chunks(channels):
  """Returns how many times `UNITS` units a warpgroup has."""
  return SUMS // channels


def _units_of_program(channels):
  return WARPGROUPS * _chunks(channels) * UNITS


def serves(channels: int, hidden: int) -> bool:
  """Returns whether programs share these hidden units evenly."""
  return channels in (64, 128) and hidden % _units_of_program(channels) == 0


def is_whole(channels: int, hidden: int) -> bool:
  """Returns whether a program has all hidden units and can store them."""
  return channels == 64 and hidden == _units_of_program(channels)


def cotangents(
  x: Array, dy: Array, scales: Array, w1: Array, b1: Array, w2: Array
) -> tuple[Array, ...]:
  """Returns those of w1, b1 and w2, in float32; if `is_whole`, also x and b2.

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
  parts = hidden // _units_of_program(channels)
  splits = gpu.split(tokens // TOKENS, parts, least=LEAST_TILES)
  whole = is_whole(channels, hidden)
  (outputs,) = plgpu.kernel(
    partial(_kernel, splits=splits, parts=parts),
    out_type=(_results(x, hidden, splits, whole),),
    scratch_types=(_scratch(channels, whole),),
    grid=(splits * parts,),
    grid_names=("program",),
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    kernel_name="mlp_backward_whole" if whole else "mlp_weights",
    compiler_params=compiler_params(),
  )(
    Inputs(
      x,
      dy,
      scales,
      w1.T.astype(jnp.bfloat16),
      w2.astype(jnp.bfloat16),
      b1.astype(jnp.float32),
    )
  )
  dw1, dw2, db1, dx, db2 = outputs
  weights = jnp.sum(dw1, 0).T, jnp.sum(db1, 0), jnp.sum(dw2, 0)
  return (*weights, dx, jnp.sum(db2, 0)) if whole else weights


def _results(x, hidden, splits, whole):
  """Returns the types of the kernel's results."""
  tokens, channels = x.shape
  sums = jax.ShapeDtypeStruct((splits, hidden, channels), jnp.float32)
  results = Outputs(
    sums, sums, jax.ShapeDtypeStruct(sums.shape[:2], jnp.float32)
  )
  if not whole:
    return results
  shape = tokens // TOKENS, channels
  return results._replace(
    dx_ref=jax.ShapeDtypeStruct(x.shape, x.dtype),
    db2_ref=jax.ShapeDtypeStruct(shape, jnp.float32),
  )


def _scratch(channels, whole):
  """Returns the types of the kernel's scratch."""
  chunks, to_input = _chunks(channels), None
  if whole:
    turns = WARPGROUPS
    to_input = ToInput(
      exchanged_ref=plgpu.SMEM((WARPGROUPS, EXCHANGED), jnp.float32),
      hidden_ref=tiles(PIECE, turns, WARPGROUPS, chunks, UNITS, TOKENS),
      made=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=turns),
      read=plgpu.Barrier(num_arrivals=1, num_barriers=turns),
    )
  return Scratch(
    biases_ref=plgpu.SMEM((WARPGROUPS, chunks, UNITS), jnp.float32),
    loaded=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
    to_input=to_input,
    images_ref=tiles(PIECE, STAGES, 2, TOKENS, channels),
    scales_ref=plgpu.SMEM((STAGES, TOKENS), jnp.float32),
    used=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    weights_ref=tiles(PIECE, WARPGROUPS, chunks, 2, UNITS, channels),
    weights_loaded=plgpu.Barrier(num_arrivals=3 * WARPGROUPS * chunks),
  )


def _kernel(
  inputs: Inputs, outputs: Outputs, scratch: Scratch, *, splits, parts
):
  warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
  # Neighbouring programs read the same tokens, from the cache.
  split, part = lax.div(program, parts), lax.rem(program, parts)
  walk = _Walk(inputs, outputs, scratch, warpgroup, part)
  all_tiles = len(inputs.x_ref) // TOKENS
  first = lax.div(split * all_tiles, splits)
  end = lax.div((split + 1) * all_tiles, splits)

  # Load the weights of all units, and the first tiles.
  @pl.when(warpgroup == 0)
  def _():
    walk.fetch_weights()
    last = jnp.minimum(first + STAGES, end)
    lax.fori_loop(first, last, lambda i, _: walk.fetch(i), None)

  units = [walk.units(warpgroup, chunk) for chunk in walk.chunks]
  plgpu.barrier_wait(scratch.weights_loaded)

  def run(to_w1, to_w2):
    def step(i, sums):
      slot, turn = lax.rem(i, STAGES), lax.rem(i, WARPGROUPS)
      tile = _Tile(i, slot, turn)

      # Wait for the tile, and until the units of this turn's last tile were
      # read.
      plgpu.barrier_wait(scratch.loaded.at[slot])
      if scratch.to_input:
        walk.wait_for_turn(i - first, turn)

      # Accumulate the weights' cotangents, in a loop: unrolled, it would take
      # more registers.
      add = partial(walk.add_piece, tile, to_w1, to_w2)
      sums = lax.fori_loop(0, TOKENS // PIECE, add, sums)

      # Compute the tokens' cotangents.
      if scratch.to_input:
        walk.sum_units(tile)
      plgpu.barrier_arrive(scratch.used.at[slot])

      # Load another tile into the slot of the step before, which the other
      # warpgroup has long been done with.
      after = i - 1 + STAGES

      @pl.when((warpgroup == 0) & (i > first) & (after < end))
      def _():
        plgpu.barrier_wait(scratch.used.at[lax.rem(after, STAGES)])
        walk.fetch(after)

      return sums

    # Go through the tiles; then store the sums.
    zeros = jnp.zeros((UNITS,), jnp.float32)
    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA.reduce(1))
    sums = lax.fori_loop(first, end, step, tuple(zeros for _ in walk.chunks))
    for chunk, own in enumerate(units):
      gpu.store(outputs.dw1_ref.at[split, own], to_w1[chunk][...])
      gpu.store(outputs.dw2_ref.at[split, own], to_w2[chunk][...])
      gpu.store(outputs.db1_ref.at[split, own], sums[chunk])

  total = plgpu.WGMMAAccumulatorRef((UNITS, inputs.x_ref.shape[1]), jnp.float32)
  totals = [total for _ in walk.chunks]
  pl.run_scoped(run, totals, totals)


class _Tile(NamedTuple):
  """A tile of tokens: its index, its slot, and whose turn it is to sum."""

  index: Any
  slot: Any
  turn: Any


class _Walk(NamedTuple):
  """The phases of the kernel, and what they take.

  Attributes:
    inputs: see `Inputs`.
    outputs: see `Outputs`.
    scratch: see `Scratch`.
    warpgroup: its index within the program.
    part: index of the program's hidden units.
  """

  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  warpgroup: Any
  part: Any

  @property
  def chunks(self) -> range:
    """The warpgroup's chunks of `UNITS` units."""
    return range(self.scratch.weights_ref.shape[1])

  def units(self, warpgroup: Any, chunk: int) -> Any:
    """Returns the slice of a chunk's units."""
    group = self.part * WARPGROUPS + warpgroup
    index = group * len(self.chunks) + chunk
    return pl.ds(index * UNITS, UNITS)

  def fetch_weights(self) -> None:
    """Starts to load both warpgroups' weights."""
    inputs, scratch = self.inputs, self.scratch
    for group, chunk in itertools.product(range(WARPGROUPS), self.chunks):
      for source_ref, target_ref in (
        (inputs.w1_ref, scratch.weights_ref.at[group, chunk, 0]),
        (inputs.w2_ref, scratch.weights_ref.at[group, chunk, 1]),
        (inputs.b1_ref, scratch.biases_ref.at[group, chunk]),
      ):
        own = self.units(group, chunk)
        plgpu.copy_gmem_to_smem(
          source_ref.at[own], target_ref, scratch.weights_loaded
        )

  def fetch(self, i: Any) -> None:
    """Starts to load a tile of tokens."""
    inputs, scratch = self.inputs, self.scratch
    slot, own = lax.rem(i, STAGES), pl.ds(i * TOKENS, TOKENS)
    for source_ref, target_ref in (
      (inputs.x_ref, scratch.images_ref.at[slot, 0]),
      (inputs.dy_ref, scratch.images_ref.at[slot, 1]),
      (inputs.scales_ref, scratch.scales_ref.at[slot]),
    ):
      plgpu.copy_gmem_to_smem(
        source_ref.at[own], target_ref, scratch.loaded.at[slot]
      )

  def add_piece(
    self,
    tile: _Tile,
    to_w1: list[Any],
    to_w2: list[Any],
    piece: Any,
    sums: tuple[Array, ...],
  ) -> tuple[Array, ...]:
    """Adds what a piece of a tile gives to the weights' cotangents.

    Args:
      tile: the tile.
      to_w1: accumulators, one a chunk.
      to_w2: accumulators, one a chunk.
      piece: index of the piece.
      sums: the accumulated cotangents of b1, one a chunk.

    Returns:
      `sums` with the piece's part.
    """
    scratch, warpgroup = self.scratch, self.warpgroup
    rows, columns = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    own, totals = pl.ds(piece * PIECE, PIECE), list(sums)
    x_ref, dy_ref = (scratch.images_ref.at[tile.slot, j, own] for j in range(2))
    for chunk in self.chunks:
      w1_ref, w2_ref = (
        scratch.weights_ref.at[warpgroup, chunk, j] for j in range(2)
      )
      # Recompute the activations, and add to dw2.
      h = product(w1_ref, x_ref.transpose((1, 0)))
      bias = gpu.load(scratch.biases_ref.at[warpgroup, chunk], rows)
      value, slope = gelu(h + lax.broadcast_in_dim(bias, h.shape, (0,)))
      scale = gpu.load(scratch.scales_ref.at[tile.slot, own], columns)
      g = scaled(value, scale, axis=1).astype(jnp.bfloat16)
      add_product(to_w2[chunk], g, dy_ref)
      # Compute the cotangents before the GELU, and add to db1 and dw1.
      dg = product(w2_ref, dy_ref.transpose((1, 0)))
      dh = scaled(slope * dg, scale, axis=1)
      totals[chunk] += jnp.sum(dh, axis=1)
      dh = dh.astype(jnp.bfloat16)
      if scratch.to_input:
        hidden_ref = scratch.to_input.hidden_ref
        hidden_ref[tile.turn, warpgroup, chunk, :, own] = dh
      add_product(to_w1[chunk], dh, x_ref)
    # Before the loop ends, where the compiler may move registers.
    plgpu.wgmma_wait(0)
    return tuple(totals)

  def wait_for_turn(self, i: Any, turn: Any) -> None:
    """Waits until the units of two tiles ago have been read."""

    @pl.when(i >= WARPGROUPS)
    def _():
      plgpu.barrier_wait(self.scratch.to_input.read.at[turn])

  def sum_units(self, tile: _Tile) -> None:
    """Writes the cotangents of a tile's tokens, and their part of b2's.

    The warpgroup whose turn it is does so, once both have stored the cotangents
    of their hidden units.
    """
    scratch, (_, _, made, read) = self.scratch, self.scratch.to_input
    # Recomputed, because one register more would spill.
    warpgroup = lax.axis_index("warpgroup")
    plgpu.commit_smem()
    plgpu.barrier_arrive(made.at[tile.turn])

    @pl.when(warpgroup == tile.turn)
    def _():
      scales_ref = scratch.scales_ref.at[tile.slot]
      scale = gpu.load(scales_ref, plgpu.Layout.WGMMA.reduce(1))
      tokens = pl.ds(tile.index * TOKENS, TOKENS)
      plgpu.barrier_wait(made.at[tile.turn])

      # In pieces, which take fewer registers.
      def add(piece, _):
        columns = pl.ds(piece * PIECE, PIECE)
        self._sum_piece(tile, warpgroup, tokens, scale, columns)

      channels = self.inputs.x_ref.shape[1]
      lax.fori_loop(0, channels // PIECE, add, None)
      plgpu.barrier_arrive(read.at[tile.turn])

  def _sum_piece(self, tile, warpgroup, tokens, scale, columns):
    """Does what `sum_units` says for some channels."""
    exchanged_ref, hidden_ref, *_ = self.scratch.to_input
    dh_ref = hidden_ref.at[tile.turn]
    weights_ref, dx_ref = self.scratch.weights_ref, self.outputs.dx_ref

    def multiply(total):
      for part in itertools.product(*map(range, weights_ref.shape[:2])):
        w1_ref = weights_ref.at[(*part, 0, slice(None), columns)]
        plgpu.wgmma(total, dh_ref.at[part].transpose((1, 0)), w1_ref)
      return total[...]

    total = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((TOKENS, PIECE)))
    # To device memory: by way of shared memory would take more registers.
    gpu.store(dx_ref.at[tokens, columns], total.astype(dx_ref.dtype))
    dy_ref = self.scratch.images_ref.at[tile.slot, 1]
    dy = gpu.load(dy_ref.at[:, columns], plgpu.Layout.WGMMA)
    dy = scaled(dy.astype(jnp.float32), scale)
    gpu.store(
      self.outputs.db2_ref.at[tile.index, columns],
      sum_rows(dy, exchanged_ref.at[warpgroup]),
    )
