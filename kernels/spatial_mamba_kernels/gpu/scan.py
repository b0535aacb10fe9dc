"""The selective scan as GPU kernels.

A program scans the tokens of one image in order, for 128 channels. Where images
and channels are too few to keep a GPU busy, tokens are cut into chunks: each is
scanned from zero first, for what it adds to a state, then from the state that
so follows for its beginning. Backward, the same goes from the last token to the
first. See `gpu.threads` for how channels lie.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.gpu.tiles import (
  GRID,
  Chunks,
  Program,
  for_tiles,
)
from spatial_mamba_kernels.recurrence import recur, shift
from spatial_mamba_kernels.shapes import with_rank_of


def scan(u, delta, A, B, bias):
  """The states [B, L, N, D] of tokens [B, L, D]; else as `selective_scan`."""
  chunks = Chunks.of(u, A)
  operands = _lay_out(u, delta, A, B, bias, chunks)
  before = _zeros(operands, chunks)
  if chunks.count > 1:
    before = _carry(operands, chunks)
  batch, length, channels = operands[0].shape
  shape = chunks.room((batch, length, chunks.states, channels))
  h = _kernel(
    _forward_kernel,
    operands,
    chunks,
    jax.ShapeDtypeStruct(shape, jnp.float32),
    scratch_types=gpu.outlet(
      "tiles", (2, chunks.tile, chunks.states, gpu.CHANNELS), jnp.float32
    ),
    name="selective_scan_forward",
  )(*operands, before)
  return h[:, : u.shape[1], :, : u.shape[2]]


def scan_backward(u, delta, A, B, bias, h, dh, *, skip=None):
  """The cotangents of what `scan` was given, from those of its states.

  Args:
    u: [B, L, D], as for `scan`, like all up to the bias.
    delta: [B, L, D].
    A: [D, N].
    B: [B, L, N].
    bias: [D].
    h: [B, L, N, D], the states.
    dh: [B, L, N, D], their cotangents.
    skip: (D [D], dy [B, L, D]) of a connection from `u` to what `dy` is the
      cotangent of, or None.

  Returns:
    du, ddelta [B, L, D]; dB [K, B, L, N], to be summed over K; and
    [G, N + 1, D], to be summed over G: of A and the bias, and with a skip of D.
  """
  _, length, channels = u.shape
  chunks = Chunks.of(u, A)
  operands = _lay_out(u, delta, A, B, bias, chunks)
  h, dh = chunks.pad(h), chunks.pad(dh)
  after = _zeros(operands, chunks)
  if chunks.count > 1:
    after = _carry(operands, chunks, dh)
  if skip:
    D, dy = skip
    skip = gpu.parameters(D[None]), chunks.pad(dy)
  tile = (2, chunks.tile, gpu.CHANNELS)
  sums = chunks.states + 1 + bool(skip)
  batch, blocks = len(u), gpu.blocks(channels)
  shape = chunks.room(operands[0].shape)
  du, ddelta, dB, parameters = _kernel(
    _backward_kernel,
    operands,
    chunks,
    [
      jax.ShapeDtypeStruct(shape, u.dtype),
      jax.ShapeDtypeStruct(shape, delta.dtype),
      jax.ShapeDtypeStruct(
        (batch, blocks, chunks.tiles, gpu.ROWS_SUMMED), jnp.float32
      ),
      jax.ShapeDtypeStruct(
        (batch, chunks.count, sums, blocks * gpu.CHANNELS), jnp.float32
      ),
    ],
    scratch_types={
      "products": plgpu.SMEM((gpu.ROWS_SUMMED, gpu.CHANNELS), jnp.float32),
      **gpu.outlet("du_tiles", tile, u.dtype),
      **gpu.outlet("ddelta_tiles", tile, delta.dtype),
    },
    name="selective_scan_backward",
  )(*operands, after, h, dh, *(skip or ()))
  dB = dB[..., : chunks.tile * chunks.states]
  dB = dB.reshape(batch, blocks, -1, chunks.states)[:, :, :length]
  return (
    du[:, :length, :channels],
    ddelta[:, :length, :channels],
    jnp.swapaxes(dB, 0, 1),
    parameters.reshape(-1, *parameters.shape[2:])[..., :channels],
  )


def _lay_out(u, delta, A, B, bias, chunks):
  """Tokens [B, L, D], A [N, D], B [B, N, L] of whole tiles, bias [1, D]."""
  B = chunks.pad_tokens(B.astype(jnp.float32))
  return (
    chunks.pad(u),
    chunks.pad(delta),
    gpu.parameters(A.T),
    B.swapaxes(1, 2),
    gpu.parameters(bias[None]),
  )


def _zeros(operands, chunks):
  """The state before each chunk if it is zero, [B, K, N, D]."""
  u, _, A, *_ = operands
  return jnp.zeros((len(u), chunks.count, *A.shape), jnp.float32)


def _carry(operands, chunks, dh=None):
  """The state before each chunk; given cotangents, what flows back to it."""
  state = _zeros(operands, chunks)
  add, time = _kernel(
    partial(_summary_kernel, reverse=dh is not None),
    operands,
    chunks,
    [state, jax.ShapeDtypeStruct(state[:, :, 0].shape, jnp.float32)],
    name="selective_scan_summary",
  )(*operands, *(() if dh is None else (chunks.pad(dh),)))
  time, rates = time[:, :, None], operands[2]
  decay = jnp.exp(time * with_rank_of(time, rates))
  state = recur(decay, add, "associative", reverse=dh is not None)
  return shift(state, 1 if dh is None else -1)


def _kernel(body, operands, chunks, results, *, name, scratch_types=None):
  u, *_ = operands
  return gpu.kernel(
    lambda *refs, **scratch: body(*refs, Program.this(chunks), **scratch),
    name=name,
    out_type=results,
    scratch_types=scratch_types or {},
    grid=(len(u), gpu.blocks(u.shape[-1]), chunks.count),
    grid_names=GRID,
  )


def _load_tile(u, delta, bias, tile):
  """Of each token: u, and the time step before softplus."""
  return (
    [u[j].astype(jnp.float32) for j in range(tile)],
    [delta[j].astype(jnp.float32) + bias for j in range(tile)],
  )


def _forward_kernel(
  u, delta, A, B, bias, before, h, program, *, tiles=None
):  # fmt: skip
  chunks, image, channels = program.chunks, program.image, program.channels
  states = range(chunks.states)
  a, shift = [A[n, channels] for n in states], bias[0, channels]

  def scan_tile(tile, u, delta, state):
    first = tile * chunks.tile
    target = h.at[image, pl.ds(first, chunks.tile), :, channels]
    place = gpu.place(tiles, tile % 2, target)
    xs, dts = _load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in dts]
    b = [[B[image, n, first + j] for n in states] for j in range(chunks.tile)]
    decays = [[jnp.exp(dt * a[n]) for n in states] for dt in dts]
    drives = [
      [x * dt * b[n] for n in states]
      for x, dt, b in zip(xs, dts, b, strict=True)
    ]
    gpu.wait_sent(1)
    for j in range(chunks.tile):
      state = [decays[j][n] * state[n] + drives[j][n] for n in states]
      for n in states:
        place[j, n] = state[n]
    gpu.commit()
    gpu.send(place, target)
    return state

  carry = [
    gpu.vector(before[image, program.chunk, n, channels]) for n in states
  ]
  for_tiles(scan_tile, (u, delta), program, carry)
  gpu.finish()


def _summary_kernel(*refs, reverse):
  """What a chunk adds to a state of zero, and how much time passes in it."""
  u, delta, A, B, bias, *dh, add, time, program = refs
  chunks, image, channels = program.chunks, program.image, program.channels
  states = range(chunks.states)
  a, shift = [A[n, channels] for n in states], bias[0, channels]

  def scan_tile(tile, u, delta, *rest):
    *dh, (state, total) = rest
    xs, dts = _load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in dts]
    order = range(chunks.tile)
    for j in reversed(order) if reverse else order:
      total = total + dts[j]
      for n in states:
        decay = jnp.exp(dts[j] * a[n])
        if reverse:
          state[n] = decay * (state[n] + dh[0][j, n])
        else:
          b = B[image, n, tile * chunks.tile + j]
          state[n] = decay * state[n] + dts[j] * xs[j] * b
    gpu.commit()
    return state, total

  carry = ([gpu.zeros() for _ in states], gpu.zeros())
  state, total = for_tiles(
    scan_tile, (u, delta, *dh), program, carry, reverse=reverse
  )
  for n in states:
    add[image, program.chunk, n, channels] = state[n]
  time[image, program.chunk, channels] = total


def _backward_kernel(*refs, products, du_tiles=None, ddelta_tiles=None):
  u, delta, A, B, bias, after, h, dh, *refs = refs
  *skip, du, ddelta, dB, dparams, program = refs
  chunks, image, channels = program.chunks, program.image, program.channels
  states = range(chunks.states)
  a, shift = [A[n, channels] for n in states], bias[0, channels]
  skips = [D[0, channels] for D in skip[:1]]

  def scan_tile(tile, u, delta, h, dh, *rest):
    *dy, before, (flow, dA, dbias, dD) = rest
    before = [jnp.where(tile > 0, before[0, n], 0) for n in states]
    first = tile * chunks.tile
    targets = [
      ref.at[image, pl.ds(first, chunks.tile), channels] for ref in (du, ddelta)
    ]
    du_place, ddelta_place = places = [
      gpu.place(tiles, tile % 2, target)
      for tiles, target in zip((du_tiles, ddelta_tiles), targets, strict=True)
    ]
    xs, raw = _load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in raw]
    gpu.wait_sent(2)
    for j in reversed(range(chunks.tile)):
      x, dt = xs[j], dts[j]
      ddt, dx = jnp.zeros_like(x), jnp.zeros_like(x)
      for n in states:
        adjoint = dh[j, n] + flow[n]
        flow[n] = jnp.exp(dt * a[n]) * adjoint
        ddecay = flow[n] * (h[j - 1, n] if j else before[n])
        drive = adjoint * B[image, n, first + j]
        ddt += ddecay * a[n] + drive * x
        dx += drive * dt
        dA[n] += ddecay * dt
        products[j * chunks.states + n] = adjoint * (dt * x)
      for cotangent, D in zip(dy, skips, strict=True):
        g = cotangent[j].astype(jnp.float32)
        dx += D * g
        dD = [dD[0] + g * x]
      dbefore = ddt * gpu.sigmoid(raw[j])
      dbias += dbefore
      du_place[j] = dx.astype(du.dtype)
      ddelta_place[j] = dbefore.astype(ddelta.dtype)
    gpu.store_channel_sums(products, dB.at[image, program.block, tile])
    for place, target in zip(places, targets, strict=True):
      gpu.send(place, target)
    gpu.commit()
    return flow, dA, dbias, dD

  carry = (
    [gpu.vector(after[image, program.chunk, n, channels]) for n in states],
    [gpu.zeros() for _ in states],
    gpu.zeros(),
    [gpu.zeros() for _ in skips],
  )
  _, dA, dbias, dD = for_tiles(
    scan_tile,
    (u, delta, h, dh, *skip[1:]),
    program,
    carry,
    reverse=True,
    last_of=(h,),
  )
  gpu.finish()
  for place, total in enumerate((*dA, dbias, *dD)):
    dparams[image, program.chunk, place, channels] = total
