"""The selective SSM as a GPU kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.scan import scan_kernel
from spatial_mamba_kernels.gpu.tiles import for_tiles
from spatial_mamba_kernels.selective_ssm.gpu_scan import (
  Inputs,
  Scan,
  carry_between_chunks,
  chunks_of,
  state_of_chunk,
)
from spatial_mamba_kernels.typing import Array


def forward(arrays: tuple[Array, ...], *, save: bool) -> tuple[Array, ...]:
  """Returns y [B, L, D] and, if `save`, the state before each segment.

  These states are [S, N, B, D], float32.
  """
  u, _, A, *_ = arrays
  batch, length, channels = u.shape
  chunks = chunks_of(u, A)
  inputs = Inputs.of(arrays, chunks)
  before = carry_between_chunks(arrays, chunks)
  results = [jax.ShapeDtypeStruct(chunks.room(inputs.u_ref.shape), u.dtype)]
  if save:
    shape = chunks.tiles, chunks.states, batch, inputs.A_ref.shape[1]
    results.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  (results,) = scan_kernel(
    _kernel,
    inputs,
    chunks,
    (results,),
    scratch_types=gpu.outlet(
      "tiles_ref", (2, chunks.tile, gpu.CHANNELS), u.dtype
    ),
    name="selective_ssm_forward",
  )(inputs, before)
  y, *saved = results
  return y[:, :length, :channels], *(x[..., :channels] for x in saved)


def _kernel(inputs: Inputs, before_refs, results, program, *, tiles_ref=None):
  y_ref, *saved_refs = results
  chunks, image, channels = program.chunks, program.image, program.channels
  scan = Scan.of(inputs, program)

  def scan_tile(tile, u, delta, state):
    for saved_ref in saved_refs:
      for n, value in enumerate(state):
        saved_ref[tile, n, image, channels] = value
    own = pl.ds(tile * chunks.tile, chunks.tile)
    target_ref = y_ref.at[image, own, channels]
    tile_ref = gpu.place(tiles_ref, tile % 2, target_ref)

    # Into the tile that was sent the time before last.
    gpu.wait_sent(1)
    observe = partial(_observe_piece, scan, tile, u, delta, tile_ref)
    state = chunks.for_pieces(observe, state)
    gpu.commit()
    gpu.send(tile_ref, target_ref)
    return state

  carry = state_of_chunk(before_refs, program)
  for_tiles(scan_tile, (inputs.u_ref, inputs.delta_ref), program, carry)
  gpu.finish()


def _observe_piece(
  scan: Scan, tile: Any, u: Any, delta: Any, y_ref: Any, index: Any, state: Any
):
  """Writes y for a piece of a tile, and returns the state after it."""
  piece = scan.scan_piece(tile, index, u, delta, state)
  c = [scan.numbers(scan.inputs.C_ref, token) for token in piece.tokens]
  first = index * scan.program.chunks.piece
  for j, (x, numbers) in enumerate(zip(piece.xs, c, strict=True)):
    y = scan.skip * x
    for number, h in zip(numbers, piece.states[j + 1], strict=True):
      y += number * h
    y_ref[first + j] = y.astype(y_ref.dtype)
  return piece.states[-1]
