"""The selective scan as GPU kernels.

A program scans the tokens of one image in order, for 128 channels. If there are
too few images and channels to keep a GPU busy, the tokens are cut into chunks,
which are scanned twice: first from zero, to compute the states before all
chunks, then from those states. The backward pass does the same from the last
token to the first. `gpu.threads` describes the layout of channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.tiles import (
  GRID,
  Chunks,
  Program,
  for_tiles,
)
from spatial_mamba_kernels.recurrence import recur, shift
from spatial_mamba_kernels.shapes import with_rank_of


def scan(u, delta, A, B, bias, h0=None):
  """Returns the states [B, L, N, D]; arguments as for `selective_scan`."""
  chunks = Chunks.of(u, A)
  operands = lay_out(u, delta, A, B, bias, chunks)
  before = carry_between_chunks(operands, chunks, first_state(operands, h0))
  batch, length, channels = operands[0].shape
  shape = chunks.room((batch, length, chunks.states, channels))
  h = scan_kernel(
    _forward_kernel,
    operands,
    chunks,
    jax.ShapeDtypeStruct(shape, jnp.float32),
    scratch_types=gpu.outlet(
      "tiles_ref", (2, chunks.tile, chunks.states, gpu.CHANNELS), jnp.float32
    ),
    name="selective_scan_forward",
  )(*operands, before)
  return h[:, : u.shape[1], :, : u.shape[2]]


def lay_out(u, delta, A, B, bias, chunks):
  """Returns u, delta [B, L, D], A [N, D], B [B, N, L] and bias, padded."""
  return (
    chunks.pad(u),
    chunks.pad(delta),
    gpu.parameters(A.T),
    numbers_by_state(B, chunks),
    gpu.parameters(bias[None]),
  )


def numbers_by_state(numbers, chunks):
  """Returns B or C [B, L, N] as [B, N, L], padded."""
  return chunks.pad_tokens(numbers.astype(jnp.float32)).swapaxes(1, 2)


def first_state(operands, h0=None):
  """Returns the state before the first token, [B, N, D], padded."""
  u, _, A, *_ = operands
  if h0 is None:
    return jnp.zeros((len(u), *A.shape), jnp.float32)
  return gpu.parameters(h0.mT)


def carry_between_chunks(
  operands, chunks, first, dh=(), *, name="selective_scan"
):
  """Returns the state before each chunk, [B, K, N, D].

  Args:
    operands: see `lay_out`.
    chunks: how the tokens are cut.
    first: the state before the first chunk; with `dh`, the adjoint after the
      last one.
    dh: the cotangents of the states, padded, for the adjoint after each chunk;
      or, where they are a product, dy [B, L, D] and C [B, N, L].
    name: of the operator.
  """
  if chunks.count == 1:
    return first[:, None]
  states = jax.ShapeDtypeStruct(
    (len(first), chunks.count, *first.shape[1:]), jnp.float32
  )
  times = jax.ShapeDtypeStruct(
    (len(first), chunks.count, first.shape[-1]), jnp.float32
  )
  add, time = scan_kernel(
    partial(_summary_kernel, reverse=bool(dh)),
    operands,
    chunks,
    [states, times],
    name=f"{name}_summary",
  )(*operands, *dh)
  time, rates = time[:, :, None], operands[2]
  decay = jnp.exp(time * with_rank_of(time, rates))
  state = recur(decay, add, first, "associative", reverse=bool(dh))
  return shift(state, -1 if dh else 1, first)


def scan_kernel(body, operands, chunks, results, *, name, scratch_types=None):
  """Returns a kernel whose body takes its `Program` after all references."""
  u, *_ = operands
  return gpu.kernel(
    lambda *refs, **scratch: body(*refs, Program.this(chunks), **scratch),
    name=name,
    out_type=results,
    scratch_types=scratch_types or {},
    grid=(len(u), gpu.blocks(u.shape[-1]), chunks.count),
    grid_names=GRID,
  )


def load_tile(u, delta, bias, tokens, first=0):
  """Returns by token u and the time step before softplus."""
  own = [first + j for j in range(tokens)]
  return (
    [u[j].astype(jnp.float32) for j in own],
    [delta[j].astype(jnp.float32) + bias for j in own],
  )


def _forward_kernel(
  u_ref, delta_ref, A_ref, B_ref, bias_ref, before_ref, h_ref, program, *,
  tiles_ref=None,
):  # fmt: skip
  chunks, image, channels = program.chunks, program.image, program.channels
  states = range(chunks.states)
  a, shift = [A_ref[n, channels] for n in states], bias_ref[0, channels]

  def scan_tile(tile, u, delta, state):
    first = tile * chunks.tile
    target_ref = h_ref.at[image, pl.ds(first, chunks.tile), :, channels]
    tile_ref = gpu.place(tiles_ref, tile % 2, target_ref)

    # Compute all decays and drives, which depend on no state.
    xs, dts = load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in dts]
    b = [
      [B_ref[image, n, first + j] for n in states] for j in range(chunks.tile)
    ]
    decays = [[jnp.exp(dt * a[n]) for n in states] for dt in dts]
    drives = [
      [x * dt * b[n] for n in states]
      for x, dt, b in zip(xs, dts, b, strict=True)
    ]

    # Scan, into the tile that was sent the time before last.
    gpu.wait_sent(1)
    for j in range(chunks.tile):
      state = [decays[j][n] * state[n] + drives[j][n] for n in states]
      for n in states:
        tile_ref[j, n] = state[n]
    gpu.commit()
    gpu.send(tile_ref, target_ref)
    return state

  carry = [
    gpu.vector(before_ref[image, program.chunk, n, channels]) for n in states
  ]
  for_tiles(scan_tile, (u_ref, delta_ref), program, carry)
  gpu.finish()


def _summary_kernel(*refs, reverse):
  """Computes the state that a chunk adds to zero, and the time it takes."""
  u_ref, delta_ref, A_ref, B_ref, bias_ref, *refs = refs
  *dh_refs, added_ref, time_ref, program = refs
  dh_refs, C_refs = dh_refs[:1], dh_refs[1:]
  chunks, image, channels = program.chunks, program.image, program.channels
  states = range(chunks.states)
  a, shift = [A_ref[n, channels] for n in states], bias_ref[0, channels]

  def cotangent(dh, tile, j, n):
    for C_ref in C_refs:
      return C_ref[image, n, tile * chunks.tile + j] * dh[j].astype(jnp.float32)
    return dh[j, n]

  def scan_tile(tile, u, delta, *rest):
    *dh, carry = rest

    def scan_piece(piece, carry):
      state, total = carry
      first = piece * chunks.piece
      xs, dts = load_tile(u, delta, shift, chunks.piece, first)
      dts = [gpu.softplus(x) for x in dts]
      order = range(chunks.piece)
      for j in reversed(order) if reverse else order:
        total = total + dts[j]
        for n in states:
          decay = jnp.exp(dts[j] * a[n])
          if reverse:
            dstate = state[n] + cotangent(dh[0], tile, first + j, n)
            state[n] = decay * dstate
          else:
            b = B_ref[image, n, tile * chunks.tile + (first + j)]
            state[n] = decay * state[n] + dts[j] * xs[j] * b
      return state, total

    carry = chunks.for_pieces(scan_piece, carry, reverse=reverse)
    gpu.commit()
    return carry

  carry = ([gpu.zeros() for _ in states], gpu.zeros())
  state, total = for_tiles(
    scan_tile, (u_ref, delta_ref, *dh_refs), program, carry, reverse=reverse
  )
  for n in states:
    added_ref[image, program.chunk, n, channels] = state[n]
  time_ref[image, program.chunk, channels] = total
