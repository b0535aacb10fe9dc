"""The backward pass of the selective SSM as a GPU kernel.

It goes from the last segment to the first. For a segment it

1. recomputes the state before each piece of the segment, from the state that
   the forward pass saved, and keeps it in shared memory;
2. goes from the last piece to the first: it recomputes the states of a piece in
   registers, and scans their cotangents in reverse.

Where a piece is a segment (up to two states) there is no first step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.scan import scan_kernel
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.gpu.tiles import Program, for_tiles
from spatial_mamba_kernels.selective_ssm.gpu_scan import (
  Inputs,
  Piece,
  Scan,
  carry_between_chunks,
  chunks_of,
  state_of_chunk,
)
from spatial_mamba_kernels.selective_ssm.plans import tokens_summed
from spatial_mamba_kernels.typing import Array

# Slots for segments that are loaded ahead: two leave room for more programs.
STAGES = 2
# Threads that share a sum over channels.
THREADS = 8


class _Cotangents(NamedTuple):
  """References to what only the backward kernel reads; also the arrays.

  Attributes:
    dy_ref: [B, L, D], padded.
    after_refs: [B, K, N, D], the adjoint that each chunk starts from; or none.
    before_ref: [S, N, B, D], the state before each segment.
  """

  dy_ref: Any
  after_refs: tuple[Any, ...]
  before_ref: Any


class _Outputs(NamedTuple):
  """References to the results of the backward kernel; also their types.

  Attributes:
    du_ref: [B, L, D].
    ddelta_ref: [B, L, D].
    numbers_ref: [B, blocks, L / Q, 2 R], of B and then of C, where Q is
      `tokens_summed` and R is `gpu.threads.ROWS_SUMMED`; the first Q N of R
      numbers are defined.
    dparams_ref: [B, K, N + 2, D], of A, the bias and D.
  """

  du_ref: Any
  ddelta_ref: Any
  numbers_ref: Any
  dparams_ref: Any


class _Scratch(NamedTuple):
  """References to shared memory; also their types.

  Attributes:
    products_ref: [2 R, 128]; see `_Outputs`.
    states_ref: [pieces, N, 128], the state before each piece; or None.
    outlets: tiles of du and ddelta to be sent; see `gpu.threads.outlet`.
  """

  products_ref: Any
  states_ref: Any
  outlets: tuple[Any, Any]


class _Sums(NamedTuple):
  """The accumulated cotangents of A, by state, the bias and D."""

  dA: list[Array]
  dbias: Array
  dD: Array


def backward(
  arrays: tuple[Array, ...], before: Array, dy: Array
) -> tuple[Array, ...]:
  """Returns the cotangents of the operator's arguments.

  Args:
    arrays: the operator's arguments.
    before: [S, N, B, D], the state before each segment.
    dy: [B, L, D], the cotangents of y.

  Returns:
    du, ddelta [B, L, D]; dB, dC [K, B, L, N], to be summed over K; and those of
    A, the bias and D, [G, N + 2, D], to be summed over G.
  """
  u, _, A, *_ = arrays
  _, length, channels = u.shape
  chunks = chunks_of(u, A)
  inputs = Inputs.of(arrays, chunks)
  cotangents = _Cotangents(
    chunks.pad(dy),
    carry_between_chunks(arrays, chunks, dy),
    gpu.parameters(before),
  )
  (outputs,) = scan_kernel(
    _kernel,
    inputs,
    chunks,
    (_results(inputs, chunks),),
    scratch_types={"scratch": _scratch(inputs, chunks)},
    name="selective_ssm_backward",
  )(inputs, cotangents)
  du, ddelta, numbers, parameters = outputs
  dB, dC = _numbers(numbers, chunks, length)
  return (
    du[:, :length, :channels],
    ddelta[:, :length, :channels],
    dB,
    dC,
    parameters.reshape(-1, *parameters.shape[2:])[..., :channels],
  )


def _results(inputs, chunks):
  """Returns the types of the kernel's results."""
  u, delta = inputs.u_ref, inputs.delta_ref
  shape, channels = chunks.room(u.shape), inputs.A_ref.shape[1]
  batch, sums = len(u), chunks.tile // tokens_summed(chunks.states)
  numbers = batch, gpu.blocks(channels), chunks.tiles * sums
  parameters = batch, chunks.count, chunks.states + 2, channels
  return _Outputs(
    jax.ShapeDtypeStruct(shape, u.dtype),
    jax.ShapeDtypeStruct(shape, delta.dtype),
    jax.ShapeDtypeStruct((*numbers, 2 * gpu.ROWS_SUMMED), jnp.float32),
    jax.ShapeDtypeStruct(parameters, jnp.float32),
  )


def _scratch(inputs, chunks):
  """Returns the types of the kernel's scratch."""

  def outlet(array):
    tile = 2, chunks.tile, gpu.CHANNELS
    return gpu.outlet("tiles", tile, array.dtype).get("tiles")

  states = chunks.pieces, chunks.states, gpu.CHANNELS
  products = 2 * gpu.ROWS_SUMMED, gpu.CHANNELS
  return _Scratch(
    plgpu.SMEM(products, jnp.float32),
    plgpu.SMEM(states, jnp.float32) if chunks.pieces > 1 else None,
    (outlet(inputs.u_ref), outlet(inputs.delta_ref)),
  )


def _numbers(sums, chunks, length):
  """Returns [K, B, L, N] of B, and of C, from the kernel's sums."""
  states = chunks.states
  batch, blocks = sums.shape[:2]
  sums = sums.reshape(batch, blocks, -1, 2, gpu.ROWS_SUMMED)
  sums = sums[..., : tokens_summed(states) * states]
  sums = jnp.moveaxis(sums, (3, 1), (0, 1))
  return sums.reshape(2, blocks, batch, -1, states)[..., :length, :]


def _kernel(
  inputs: Inputs,
  cotangents: _Cotangents,
  outputs: _Outputs,
  program: Program,
  *,
  scratch: _Scratch,
):
  back = _Backward(Scan.of(inputs, program), outputs, scratch)

  # Scan the chunk in reverse, from the adjoint after it.
  zeros = [gpu.zeros() for _ in range(program.chunks.states)]
  after = state_of_chunk(cotangents.after_refs, program)
  _, (dA, dbias, dD) = for_tiles(
    back.scan_tile,
    (inputs.u_ref, inputs.delta_ref, cotangents.dy_ref),
    program,
    (after, _Sums(zeros, gpu.zeros(), gpu.zeros())),
    reverse=True,
    before=(cotangents.before_ref,),
    stages=STAGES,
  )

  # Store what has been summed over the chunk.
  gpu.finish()
  for index, total in enumerate((*dA, dbias, dD)):
    outputs.dparams_ref[
      program.image, program.chunk, index, program.channels
    ] = total


class _Backward(NamedTuple):
  """What the backward kernel needs for each tile.

  Attributes:
    scan: the recurrence.
    outputs: see `_Outputs`.
    scratch: see `_Scratch`.
  """

  scan: Scan
  outputs: _Outputs
  scratch: _Scratch

  def scan_tile(self, tile, u, delta, dy, before, carry):
    """Returns the adjoint before a tile, and the sums with its part.

    Args:
      tile: index of the tile.
      u: [tile, 128], like `delta` and `dy`.
      delta: see above.
      dy: see above.
      before: [N, 128], the state before the tile.
      carry: the adjoint after the tile, and the sums so far.
    """
    program = self.scan.program
    chunks, states_ref = program.chunks, self.scratch.states_ref
    own = pl.ds(tile * chunks.tile, chunks.tile)
    targets = [
      ref.at[program.image, own, program.channels]
      for ref in (self.outputs.du_ref, self.outputs.ddelta_ref)
    ]
    tile_refs = [
      gpu.place(outlet, tile % 2, target)
      for outlet, target in zip(self.scratch.outlets, targets, strict=True)
    ]
    state = [before[n] for n in range(chunks.states)]
    if chunks.pieces > 1:
      self._recompute(tile, u, delta, [gpu.vector(x) for x in state])

    def scan_piece(index, carry):
      start = state
      if chunks.pieces > 1:
        start = [states_ref[index, n] for n in range(chunks.states)]
      piece = self.scan.scan_piece(tile, index, u, delta, start)
      return self._scan_back(tile, index, piece, dy, tile_refs, carry)

    # Into the tiles that were sent the time before last.
    gpu.wait_sent(2)
    carry = chunks.for_pieces(scan_piece, carry, reverse=True)
    for tile_ref, target in zip(tile_refs, targets, strict=True):
      gpu.send(tile_ref, target)
    gpu.commit()
    return carry

  def _recompute(self, tile, u, delta, state):
    """Keeps the state before each piece of a tile."""
    states_ref = self.scratch.states_ref

    def keep(index, state):
      for n, value in enumerate(state):
        states_ref[index, n] = value

    def scan_piece(index, state):
      keep(index, state)
      return self.scan.scan_piece(tile, index, u, delta, state).states[-1]

    last = self.scan.program.chunks.pieces - 1
    keep(last, jax.lax.fori_loop(0, last, scan_piece, state))

  def _scan_back(self, tile, index, piece: Piece, dy, tile_refs, carry):
    """Returns the adjoint before a piece, and the sums with its part."""
    program, scan = self.scan.program, self.scan
    adjoint, (dA, dbias, dD) = carry
    adjoint, dA = list(adjoint), list(dA)
    chunks, states = program.chunks, len(adjoint)
    summed, first = tokens_summed(states), index * chunks.piece
    products_ref, (du_ref, ddelta_ref) = self.scratch.products_ref, tile_refs
    dys = [dy[first + j].astype(jnp.float32) for j in range(chunks.piece)]
    for j in reversed(range(chunks.piece)):
      x, dt, g, before = piece.xs[j], piece.dts[j], dys[j], piece.states[j]
      b, c = (
        scan.numbers(ref, piece.tokens[j])
        for ref in (scan.inputs.B_ref, scan.inputs.C_ref)
      )
      drive, ddt, dx = x * dt, jnp.zeros_like(x), jnp.zeros_like(x)
      for n, a in enumerate(scan.a):
        row = j % summed * states + n
        products_ref[gpu.ROWS_SUMMED + row] = g * piece.states[j + 1][n]
        dstate = c[n] * g + adjoint[n]
        products_ref[row] = dstate * drive
        dx += b[n] * dstate
        adjoint[n] = piece.decays[j][n] * dstate
        ddecay = adjoint[n] * before[n]
        ddt += ddecay * a
        dA[n] += ddecay * dt
      draw = (ddt + dx * x) * gpu.sigmoid(piece.raw[j])
      dbias += draw
      dD += g * x
      du_ref[first + j] = (dx * dt + scan.skip * g).astype(du_ref.dtype)
      ddelta_ref[first + j] = draw.astype(ddelta_ref.dtype)
      if j % summed == 0:
        token = tile * chunks.tile + first + j
        out_ref = self.outputs.numbers_ref.at[
          program.image, program.block, token // summed
        ]
        gpu.store_channel_sums(products_ref, out_ref, threads=THREADS)
    return adjoint, _Sums(dA, dbias, dD)
