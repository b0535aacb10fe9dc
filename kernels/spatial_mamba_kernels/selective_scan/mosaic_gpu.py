"""The selective scan as GPU kernels.

A program scans the tokens of one image in order, for 128 channels. Where images
and channels are too few to keep a GPU busy, tokens are cut into chunks: each is
scanned from zero first, for what it adds to a state, then from the state that
so follows for its beginning. Backward, the same goes from the last token to the
first. See `gpu_threads` for how channels lie.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.by_platform import Arrays, Kernel, Passes
from spatial_mamba_kernels.gpu_threads import plgpu
from spatial_mamba_kernels.selective_scan import xla
from spatial_mamba_kernels.selective_scan.dimensions import SUMS, finish
from spatial_mamba_kernels.typing import Array

# A thread keeps a decay, a state and a sum for each in registers.
MOST_STATES = 16


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where there are too many states."""
  gpu.check_served(arrays)
  states = arrays[2].shape[1]
  if states > MOST_STATES:
    raise NotImplementedError(
      f"mosaic_gpu keeps up to {MOST_STATES} states a channel in registers,"
      f" not {states}"
    )


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The states [B, L, N, D] on one device."""
  del save  # The result is all that the backward pass needs.
  return (scan(*arrays),)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Cotangents on one device; see `scan_backward`."""
  u, delta, A, B, bias = arrays
  (h,) = saved
  return scan_backward(u, delta, A, B, bias, h, g)


KERNEL = Kernel(
  plan,
  Passes(run_forward, run_backward),
  finish,
  SUMS,
  check_device=gpu.check_device,
)


@dataclasses.dataclass(frozen=True)
class Chunks:
  """How the tokens of an image are cut: into chunks of whole tiles.

  Attributes:
    states: of a channel.
    tiles: in all; the last one may reach beyond the tokens.
    per_chunk: tiles of a chunk; the last one may have fewer.
  """

  states: int
  tiles: int
  per_chunk: int

  @classmethod
  def of(cls, u: Array, A: Array) -> "Chunks":
    """As many chunks as a GPU needs, and no more."""
    batch, length, channels = u.shape
    states = A.shape[1]
    tiles = -(-length // tokens_of_tile(states))
    programs = batch * gpu.blocks(channels)
    parts = gpu.split(tiles, programs, least=gpu.CONFIG.stages)
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
    """How many tiles a chunk has."""
    if self.tiles % self.per_chunk == 0:
      return self.per_chunk
    return jnp.minimum(self.per_chunk, self.tiles - chunk * self.per_chunk)


def tokens_of_tile(states: int) -> int:
  """So many that the code is as long for any number of states."""
  return max(1, gpu.CONFIG.tokens // states)


def scan(u, delta, A, B, bias):
  """The states [B, L, N, D] of tokens [B, L, D]; else as `selective_scan`."""
  chunks = Chunks.of(u, A)
  operands = _lay_out(u, delta, A, B, bias, chunks)
  before = _zeros(operands, chunks)
  if chunks.count > 1:
    before = _carry(operands, chunks)
  batch, length, channels = operands[0].shape
  h = _kernel(
    _forward_kernel,
    operands,
    chunks,
    jax.ShapeDtypeStruct((batch, length, chunks.states, channels), jnp.float32),
    scratch_types=[
      plgpu.SMEM((2, chunks.tile, chunks.states, gpu.CHANNELS), jnp.float32)
    ],
    name="selective_scan_forward",
  )(*operands, before)
  return h[..., : u.shape[-1]]


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
  channels = u.shape[-1]
  chunks = Chunks.of(u, A)
  operands = _lay_out(u, delta, A, B, bias, chunks)
  h, dh = gpu.pad_channels(h), gpu.pad_channels(dh)
  after = _zeros(operands, chunks)
  if chunks.count > 1:
    after = _carry(operands, chunks, dh)
  if skip:
    D, dy = skip
    skip = gpu.parameters(D[None]), gpu.pad_channels(dy)
  tile = (2, chunks.tile, gpu.CHANNELS)
  sums = chunks.states + 1 + bool(skip)
  batch, blocks = len(u), gpu.blocks(channels)
  du, ddelta, dB, parameters = _kernel(
    _backward_kernel,
    operands,
    chunks,
    [
      jax.ShapeDtypeStruct(operands[0].shape, u.dtype),
      jax.ShapeDtypeStruct(operands[0].shape, delta.dtype),
      jax.ShapeDtypeStruct(
        (batch, blocks, chunks.tiles, gpu.ROWS_SUMMED), jnp.float32
      ),
      jax.ShapeDtypeStruct(
        (batch, chunks.count, sums, blocks * gpu.CHANNELS), jnp.float32
      ),
    ],
    scratch_types=[
      plgpu.SMEM(tile, u.dtype),
      plgpu.SMEM(tile, delta.dtype),
      plgpu.SMEM((gpu.ROWS_SUMMED, gpu.CHANNELS), jnp.float32),
    ],
    name="selective_scan_backward",
  )(*operands, after, h, dh, *(skip or ()))
  dB = dB[..., : chunks.tile * chunks.states]
  dB = dB.reshape(batch, blocks, -1, chunks.states)[:, :, : u.shape[1]]
  return (
    du[..., :channels],
    ddelta[..., :channels],
    jnp.swapaxes(dB, 0, 1),
    parameters.reshape(-1, *parameters.shape[2:])[..., :channels],
  )


def _lay_out(u, delta, A, B, bias, chunks):
  """Tokens [B, L, D], A [N, D], B [B, N, L] of whole tiles, bias [1, D]."""
  B = B.astype(jnp.float32).swapaxes(1, 2)
  filling = chunks.tiles * chunks.tile - B.shape[-1]
  return (
    gpu.pad_channels(u),
    gpu.pad_channels(delta),
    gpu.parameters(A.T),
    jnp.pad(B, ((0, 0), (0, 0), (0, filling))),
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
  )(*operands, *(() if dh is None else (gpu.pad_channels(dh),)))
  decay = jnp.exp(time[:, :, None] * operands[2])
  state = xla.recur(decay, add, "associative", reverse=dh is not None)
  return xla.shift(state, 1 if dh is None else -1)


def _kernel(body, operands, chunks, results, *, name, scratch_types=()):
  u, *_ = operands
  return gpu.kernel(
    partial(body, chunks=chunks),
    name=name,
    out_type=results,
    scratch_types=scratch_types,
    grid=(len(u), gpu.blocks(u.shape[-1]), chunks.count),
    grid_names=("image", "block", "chunk"),
  )


def _program():
  """This program's image, block of channels, their index, and its chunk."""
  block = lax.axis_index("block")
  channels = pl.ds(block * gpu.CHANNELS, gpu.CHANNELS)
  return lax.axis_index("image"), block, channels, lax.axis_index("chunk")


def _for_tiles(body, refs, chunks, carry, *, reverse=False, last_of=()):
  """Calls body(tile, *tiles, carry) for the tiles of a chunk.

  Args:
    body: returns the next carry.
    refs: references to [B, L, ..., D].
    chunks: how tokens are cut.
    carry: the first one.
    reverse: from the last tile to the first.
    last_of: references of which the body is given, after the tiles, the last
      token before the tile; the first tile's is meaningless.
  """
  image, block, _, chunk = _program()
  count = chunks.tiles_of(chunk)

  def tile_of(step):
    step = count - 1 - step if reverse else step
    return chunk * chunks.per_chunk + step

  def spec(ref, tokens, first):
    rest = ref.shape[2:-1]
    return plgpu.BlockSpec(
      (None, pl.Element(tokens), *rest, gpu.CHANNELS),
      lambda step: (image, first(tile_of(step)), *(0 for _ in rest), block),
    )

  def first(tile):
    return tile * chunks.tile

  def last_before(tile):
    return jnp.maximum(tile * chunks.tile - 1, 0)

  def step(indices, *arguments):
    return body(tile_of(indices[0]), *arguments)

  return plgpu.emit_pipeline(
    step,
    grid=(count,),
    in_specs=[
      *(spec(ref, chunks.tile, first) for ref in refs),
      *(spec(ref, 1, last_before) for ref in last_of),
    ],
    max_concurrent_steps=gpu.CONFIG.stages,
    init_carry=carry,
  )(*refs, *last_of)


def _load_tile(u, delta, bias, tile):
  """Of each token: u, and the time step before softplus."""
  return (
    [u[j].astype(jnp.float32) for j in range(tile)],
    [delta[j].astype(jnp.float32) + bias for j in range(tile)],
  )


def _forward_kernel(
  u, delta, A, B, bias, before, h, out, *, chunks
):  # fmt: skip
  image, _, channels, chunk = _program()
  states = range(chunks.states)
  a, shift = [A[n, channels] for n in states], bias[0, channels]

  def scan_tile(tile, u, delta, state):
    first, place = tile * chunks.tile, out.at[tile % 2]
    xs, dts = _load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in dts]
    b = [[B[image, n, first + j] for n in states] for j in range(chunks.tile)]
    decays = [[jnp.exp(dt * a[n]) for n in states] for dt in dts]
    drives = [
      [x * dt * b[n] for n in states]
      for x, dt, b in zip(xs, dts, b, strict=True)
    ]
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    for j in range(chunks.tile):
      state = [decays[j][n] * state[n] + drives[j][n] for n in states]
      for n in states:
        place[j, n] = state[n]
    gpu.commit()
    tokens = pl.ds(first, chunks.tile)
    plgpu.copy_smem_to_gmem(place, h.at[image, tokens, :, channels])
    return state

  carry = [gpu.vector(before[image, chunk, n, channels]) for n in states]
  _for_tiles(scan_tile, (u, delta), chunks, carry)
  plgpu.wait_smem_to_gmem(0)


def _summary_kernel(*refs, chunks, reverse):
  """What a chunk adds to a state of zero, and how much time passes in it."""
  u, delta, A, B, bias, *dh, add, time = refs
  image, _, channels, chunk = _program()
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
  state, total = _for_tiles(
    scan_tile, (u, delta, *dh), chunks, carry, reverse=reverse
  )
  for n in states:
    add[image, chunk, n, channels] = state[n]
  time[image, chunk, channels] = total


def _backward_kernel(*refs, chunks):
  u, delta, A, B, bias, after, h, dh, *refs = refs
  *skip, du, ddelta, dB, dparams, du_tile, ddelta_tile, products = refs
  image, block, channels, chunk = _program()
  states = range(chunks.states)
  a, shift = [A[n, channels] for n in states], bias[0, channels]
  skips = [D[0, channels] for D in skip[:1]]

  def scan_tile(tile, u, delta, h, dh, *rest):
    *dy, before, (flow, dA, dbias, dD) = rest
    before = [jnp.where(tile > 0, before[0, n], 0) for n in states]
    first, place = tile * chunks.tile, tile % 2
    xs, raw = _load_tile(u, delta, shift, chunks.tile)
    dts = [gpu.softplus(x) for x in raw]
    plgpu.wait_smem_to_gmem(2, wait_read_only=True)
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
      du_tile[place, j] = dx.astype(du.dtype)
      ddelta_tile[place, j] = dbefore.astype(ddelta.dtype)
    gpu.store_channel_sums(products, dB.at[image, block, tile])
    tokens = pl.ds(first, chunks.tile)
    for source, target in ((du_tile, du), (ddelta_tile, ddelta)):
      plgpu.copy_smem_to_gmem(
        source.at[place], target.at[image, tokens, channels]
      )
    gpu.commit()
    return flow, dA, dbias, dD

  carry = (
    [gpu.vector(after[image, chunk, n, channels]) for n in states],
    [gpu.zeros() for _ in states],
    gpu.zeros(),
    [gpu.zeros() for _ in skips],
  )
  _, dA, dbias, dD = _for_tiles(
    scan_tile,
    (u, delta, h, dh, *skip[1:]),
    chunks,
    carry,
    reverse=True,
    last_of=(h,),
  )
  plgpu.wait_smem_to_gmem(0)
  for place, total in enumerate((*dA, dbias, *dD)):
    dparams[image, chunk, place, channels] = total
