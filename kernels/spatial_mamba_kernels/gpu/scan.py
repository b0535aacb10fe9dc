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
  first = first_state(operands, h0)
  before = first[:, None]
  if chunks.count > 1:
    before = carry_between_chunks(operands, chunks, first)
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
  B = chunks.pad_tokens(B.astype(jnp.float32))
  return (
    chunks.pad(u),
    chunks.pad(delta),
    gpu.parameters(A.T),
    B.swapaxes(1, 2),
    gpu.parameters(bias[None]),
  )


def first_state(operands, h0=None):
  """Returns the state before the first token, [B, N, D], padded."""
  u, _, A, *_ = operands
  if h0 is None:
    return jnp.zeros((len(u), *A.shape), jnp.float32)
  return gpu.parameters(h0.mT)


def carry_between_chunks(operands, chunks, first, dh=None):
  """Returns the state before each chunk, [B, K, N, D].

  Args:
    operands: see `lay_out`.
    chunks: how the tokens are cut.
    first: the state before the first chunk; with `dh`, the adjoint after the
      last one.
    dh: the cotangents of the states, for the adjoint after each chunk.
  """
  states = jax.ShapeDtypeStruct(
    (len(first), chunks.count, *first.shape[1:]), jnp.float32
  )
  times = jax.ShapeDtypeStruct(
    (len(first), chunks.count, first.shape[-1]), jnp.float32
  )
  add, time = scan_kernel(
    partial(_summary_kernel, reverse=dh is not None),
    operands,
    chunks,
    [states, times],
    name="selective_scan_summary",
  )(*operands, *(() if dh is None else (chunks.pad(dh),)))
  time, rates = time[:, :, None], operands[2]
  decay = jnp.exp(time * with_rank_of(time, rates))
  state = recur(decay, add, first, "associative", reverse=dh is not None)
  return shift(state, 1 if dh is None else -1, first)


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


def load_tile(u, delta, bias, tile):
  """Returns by token u and the time step before softplus."""
  return (
    [u[j].astype(jnp.float32) for j in range(tile)],
    [delta[j].astype(jnp.float32) + bias for j in range(tile)],
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
  chunks, image, channels = program.chunks, program.image, program.channels
  states = range(chunks.states)
  a, shift = [A_ref[n, channels] for n in states], bias_ref[0, channels]

  def scan_tile(tile, u, delta, *rest):
    *dh, (state, total) = rest
    xs, dts = load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in dts]
    order = range(chunks.tile)
    for j in reversed(order) if reverse else order:
      total = total + dts[j]
      for n in states:
        decay = jnp.exp(dts[j] * a[n])
        if reverse:
          state[n] = decay * (state[n] + dh[0][j, n])
        else:
          b = B_ref[image, n, tile * chunks.tile + j]
          state[n] = decay * state[n] + dts[j] * xs[j] * b
    gpu.commit()
    return state, total

  carry = ([gpu.zeros() for _ in states], gpu.zeros())
  state, total = for_tiles(
    scan_tile, (u_ref, delta_ref, *dh_refs), program, carry, reverse=reverse
  )
  for n in states:
    added_ref[image, program.chunk, n, channels] = state[n]
  time_ref[image, program.chunk, channels] = total
