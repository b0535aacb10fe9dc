"""How GPU kernels go over the tokens of an image, tile by tile.

A program computes all tokens for 128 channels, or a chunk of them if a GPU
needs more programs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

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
    tiles: tiles of an image; the last one may extend beyond the tokens.
    per_chunk: tiles of a chunk; the last chunk may have fewer.
  """

  states: int
  tiles: int
  per_chunk: int

  @classmethod
  def of(cls, u: Array, A: Array) -> "Chunks":
    """Returns as many chunks as a GPU needs, and no more."""
    batch, length, channels = u.shape
    states = A.shape[1]
    tiles = -(-length // tokens_of_tile(states))
    programs = batch * gpu.blocks(channels)
    parts = gpu.split(tiles, programs, least=plan.CONFIG.stages)
    return cls(states, tiles, -(-tiles // parts))

  @property
  def tile(self) -> int:
    """Tokens of a tile."""
    return tokens_of_tile(self.states)

  @property
  def count(self) -> int:
    """How many chunks there are."""
    return -(-self.tiles // self.per_chunk)

  def tiles_of(self, chunk: Any) -> Any:
    """Returns how many tiles a chunk has."""
    if self.tiles % self.per_chunk == 0:
      return self.per_chunk
    return jnp.minimum(self.per_chunk, self.tiles - chunk * self.per_chunk)

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


def for_tiles(
  body: Callable[..., Any],
  refs: Sequence[Any],
  program: Program,
  carry: Any,
  *,
  reverse: bool = False,
  last_of: Sequence[Any] = (),
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

  sources = [(ref, chunks.tile, first) for ref in refs]
  sources += [(ref, 1, last_before) for ref in last_of]
  walk = _by_tma if device().tma else _by_threads
  return walk(body, sources, program, tile_of, count, carry)


def _by_tma(body, sources, program, tile_of, count, carry):
  def spec(ref, tokens, first):
    rest = ref.shape[2:-1]
    return plgpu.BlockSpec(
      (None, pl.Element(tokens), *rest, gpu.CHANNELS),
      lambda step: (
        program.image,
        first(tile_of(step)),
        *(0 for _ in rest),
        program.block,
      ),
    )

  def step(indices, *arguments):
    return body(tile_of(indices[0]), *arguments)

  return plgpu.emit_pipeline(
    step,
    grid=(count,),
    in_specs=[spec(*source) for source in sources],
    max_concurrent_steps=plan.CONFIG.stages,
    init_carry=carry,
  )(*(ref for ref, *_ in sources))


def _by_threads(body, sources, program, tile_of, count, carry):
  """Loads the next tile into registers while a tile is computed."""

  def load(step):
    tile = tile_of(jnp.minimum(step, count - 1))
    return [_load(program, tile, *source) for source in sources]

  def step(index, carry):
    tiles, carry = carry
    coming = load(index + 1)
    return coming, body(tile_of(index), *tiles, carry)

  _, carry = lax.fori_loop(0, count, step, (load(0), carry))
  return carry


def _load(program, tile, ref, tokens, first):
  """Returns a tile as {index: vector of channels}."""
  start, rest = first(tile), ref.shape[2:-1]
  return {
    (j, *indices) if rest else j: gpu.vector(
      ref[program.image, start + j, *indices, program.channels]
    )
    for j, *indices in np.ndindex(tokens, *rest)
  }
