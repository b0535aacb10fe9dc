"""How GPU kernels go over the tokens of an image, tile by tile.

A program computes all tokens for 128 channels, or a chunk of them if a GPU
needs more programs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import plan
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.typing import Array

GRID = ("image", "block", "chunk")


@dataclasses.dataclass(frozen=True)
class Chunks:
  """How the tokens of an image are cut: into chunks of whole tiles.

  Attributes:
    states: states of a channel.
    tile: tokens of a tile.
    piece: tokens in one unrolled piece of code; divides a tile.
    tiles: tiles of an image; the last one may extend beyond the tokens.
    per_chunk: tiles of a chunk; the last chunk may have fewer.
  """

  states: int
  tile: int
  piece: int
  tiles: int
  per_chunk: int

  @classmethod
  def of(
    cls, u: Array, A: Array, tile: int | None = None, piece: int | None = None
  ) -> "Chunks":
    """Returns as many chunks as a GPU needs, and no more."""
    batch, length, channels = u.shape
    states = A.shape[1]
    tile = tile or tokens_of_tile(states)
    tiles = -(-length // tile)
    programs = batch * gpu.blocks(channels)
    parts = gpu.split(tiles, programs, least=plan.CONFIG.stages)
    return cls(states, tile, piece or tile, tiles, -(-tiles // parts))

  @property
  def pieces(self) -> int:
    """Pieces of a tile."""
    return self.tile // self.piece

  @property
  def count(self) -> int:
    """How many chunks there are."""
    return -(-self.tiles // self.per_chunk)

  def tiles_of(self, chunk: Any) -> Any:
    """Returns how many tiles a chunk has."""
    if self.tiles % self.per_chunk == 0:
      return self.per_chunk
    return jnp.minimum(self.per_chunk, self.tiles - chunk * self.per_chunk)

  def for_pieces(
    self, body: Callable[..., Any], carry: Any, *, reverse: bool = False
  ) -> Any:
    """Calls body(index of the piece, carry) for the pieces of a tile."""
    if self.pieces == 1:
      return body(0, carry)

    def step(index, carry):
      return body(self.pieces - 1 - index if reverse else index, carry)

    return lax.fori_loop(0, self.pieces, step, carry)

  def pad(self, x: Array) -> Array:
    """Pads channels and tokens of [B, L, ..., D] as copies require."""
    x = gpu.pad_channels(x)
    return x if device().tma else self.pad_tokens(x)

  def room(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that results need; see `gpu.threads.room`."""
    batch, length, *rest, _ = shape
    sent = (self.tile, *rest, gpu.CHANNELS)
    if gpu.is_one_piece(shape, sent):
      length = self.tiles * self.tile
    return gpu.room((batch, length, *shape[2:]), sent)

  def pad_tokens(self, x: Array) -> Array:
    """Pads tokens to whole tiles."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, self.tiles * self.tile - x.shape[1])
    return jnp.pad(x, padding)


def tokens_of_tile(states):
  """Returns the tokens of a tile, so that code is as long for any states."""
  return max(1, plan.CONFIG.tokens // states)


@dataclasses.dataclass(frozen=True)
class Program:
  """What this program computes: its indices in the grid."""

  chunks: Chunks
  image: Any
  block: Any
  chunk: Any

  @classmethod
  def this(cls, chunks: Chunks) -> "Program":
    """Returns the one that runs."""
    return cls(chunks, *(lax.axis_index(name) for name in GRID))

  @property
  def channels(self) -> Any:
    """Slice of its channels."""
    return pl.ds(self.block * gpu.CHANNELS, gpu.CHANNELS)


class _Tokens(NamedTuple):
  """Tokens of an image, loaded for each tile.

  Attributes:
    ref: reference to [B, L, ..., D].
    tokens: how many.
    first: tile -> index of the first one.
  """

  ref: Any
  tokens: int
  first: Callable[[Any], Any]

  def spec(self, program: Program, tile_of: Callable[[Any], Any]) -> Any:
    """Returns what the TMA copies at each step."""
    rest = self.ref.shape[2:-1]
    return plgpu.BlockSpec(
      (None, pl.Element(self.tokens), *rest, gpu.CHANNELS),
      lambda step: (
        program.image,
        self.first(tile_of(step)),
        *(0 for _ in rest),
        program.block,
      ),
    )

  def load(self, program: Program, tile: Any) -> dict[Any, Array]:
    """Returns a tile as {index: vector of channels}."""
    start, rest = self.first(tile), self.ref.shape[2:-1]
    return {
      (j, *indices) if rest else j: gpu.vector(
        self.ref[program.image, start + j, *indices, program.channels]
      )
      for j, *indices in np.ndindex(self.tokens, *rest)
    }

  def at(self, program: Program, tile: Any) -> Any:
    """Returns a reference to a tile."""
    rest = (slice(None) for _ in self.ref.shape[2:-1])
    own = pl.ds(self.first(tile), self.tokens)
    return self.ref.at[program.image, own, *rest, program.channels]


class _States(NamedTuple):
  """The state of each channel before a tile, in a reference to [T, N, B, D]."""

  ref: Any

  def spec(self, program: Program, tile_of: Callable[[Any], Any]) -> Any:
    """Returns what the TMA copies at each step."""
    return plgpu.BlockSpec(
      (None, program.chunks.states, None, gpu.CHANNELS),
      lambda step: (tile_of(step), 0, program.image, program.block),
    )

  def load(self, program: Program, tile: Any) -> dict[Any, Array]:
    """Returns a vector of channels for each state."""
    ref = self.at(program, tile)
    return {n: gpu.vector(ref[n]) for n in range(program.chunks.states)}

  def at(self, program: Program, tile: Any) -> Any:
    """Returns a reference to the states before a tile."""
    return self.ref.at[tile, :, program.image, program.channels]


def for_tiles(
  body: Callable[..., Any],
  refs: Sequence[Any],
  program: Program,
  carry: Any,
  *,
  reverse: bool = False,
  last_of: Sequence[Any] = (),
  before: Sequence[Any] = (),
  stages: int | None = None,
) -> Any:
  """Calls body(tile, *tiles, carry) for the tiles of a chunk.

  Args:
    body: returns the next carry.
    refs: references to [B, L, ..., D].
    program: its chunk's tiles.
    carry: the first one.
    reverse: from the last tile to the first.
    last_of: references of which the body gets, after the tiles, the last token
      before the tile; undefined for the first tile.
    before: references to [T, N, B, D], the states before each tile, which the
      body gets next.
    stages: slots for tiles that the TMA loads ahead; None for the usual ones.
  """
  chunks = program.chunks
  count = chunks.tiles_of(program.chunk)

  def tile_of(step):
    step = count - 1 - step if reverse else step
    return program.chunk * chunks.per_chunk + step

  def first(tile):
    return tile * chunks.tile

  def last_before(tile):
    return jnp.maximum(tile * chunks.tile - 1, 0)

  sources: list[_Tokens | _States] = [
    _Tokens(ref, chunks.tile, first) for ref in refs
  ]
  sources += [_Tokens(ref, 1, last_before) for ref in last_of]
  sources += [_States(ref) for ref in before]
  if device().tma:
    walk = partial(_by_tma, stages or plan.CONFIG.stages)
  else:
    walk = _by_threads if chunks.pieces == 1 else _in_place
  return walk(body, sources, program, tile_of, count, carry)


def _by_tma(stages, body, sources, program, tile_of, count, carry):
  def step(indices, *arguments):
    return body(tile_of(indices[0]), *arguments)

  return plgpu.emit_pipeline(
    step,
    grid=(count,),
    in_specs=[source.spec(program, tile_of) for source in sources],
    max_concurrent_steps=stages,
    init_carry=carry,
  )(*(source.ref for source in sources))


def _by_threads(body, sources, program, tile_of, count, carry):
  """Loads the next tile into registers while a tile is computed."""

  def load(step):
    tile = tile_of(jnp.minimum(step, count - 1))
    return [source.load(program, tile) for source in sources]

  def step(index, carry):
    tiles, carry = carry
    coming = load(index + 1)
    return coming, body(tile_of(index), *tiles, carry)

  _, carry = lax.fori_loop(0, count, step, (load(0), carry))
  return carry


def _in_place(body, sources, program, tile_of, count, carry):
  """Leaves it to each piece to load its tokens."""

  def step(index, carry):
    tile = tile_of(index)
    return body(tile, *(source.at(program, tile) for source in sources), carry)

  return lax.fori_loop(0, count, step, carry)
