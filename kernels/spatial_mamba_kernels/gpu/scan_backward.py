"""The backward pass of the selective scan as a GPU kernel; see `gpu.scan`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.scan import (
  carry_between_chunks,
  first_state,
  lay_out,
  load_tile,
  scan_kernel,
)
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.gpu.tiles import Chunks, Program, for_tiles
from spatial_mamba_kernels.typing import Array


class _Inputs(NamedTuple):
  """References to the inputs of the backward kernel; see `scan_backward`.

  `first_ref` has the state before the first token, [B, N, D]; `after_ref` the
  adjoint that each chunk starts from, [B, K, N, D].
  `skip_refs` are D, [1, D], and dy, or nothing.
  """

  u_ref: Any
  delta_ref: Any
  A_ref: Any
  B_ref: Any
  bias_ref: Any
  first_ref: Any
  after_ref: Any
  h_ref: Any
  dh_ref: Any
  skip_refs: tuple[Any, ...]


class _Outputs(NamedTuple):
  """References to the results of the backward kernel; also their types.

  Attributes:
    du_ref: [B, L, D].
    ddelta_ref: [B, L, D].
    dB_ref: [B, blocks, tiles, `gpu.threads.ROWS_SUMMED`].
    dparams_ref: [B, K, N + 1, D], of A and the bias; with a skip also of D.
    dbefore_ref: [B, K, N, D], of the state before each chunk.
  """

  du_ref: Any
  ddelta_ref: Any
  dB_ref: Any
  dparams_ref: Any
  dbefore_ref: Any


class _Sums(NamedTuple):
  """The accumulated cotangents of A, by state, the bias and, in a list, D."""

  dA: list[Array]
  dbias: Array
  dD: list[Array]


def scan_backward(u, delta, A, B, bias, h0, h, dh, *, skip=None):
  """Returns the cotangents of the arguments of `scan`.

  Args:
    u: [B, L, D].
    delta: [B, L, D].
    A: [D, N].
    B: [B, L, N].
    bias: [D].
    h0: [B, D, N], or None for 0.
    h: [B, L, N, D], the states.
    dh: [B, L, N, D], their cotangents.
    skip: (D [D], dy [B, L, D]) of a connection from `u` to y = D * u, or None.

  Returns:
    du, ddelta [B, L, D]; dB [K, B, L, N], to be summed over K; those of A, the
    bias and, with a skip, D, [G, N + 1 or 2, D], to be summed over G; and dh0,
    [B, D, N].
  """
  batch, length, channels = u.shape
  chunks = Chunks.of(u, A)
  operands = lay_out(u, delta, A, B, bias, chunks)
  h, dh = chunks.pad(h), chunks.pad(dh)
  after = carry_between_chunks(operands, chunks, first_state(operands), (dh,))
  if skip:
    D, dy = skip
    skip = gpu.parameters(D[None]), chunks.pad(dy)
  first = first_state(operands, h0)
  inputs = _Inputs(*operands, first, after, h, dh, skip or ())
  tile = (2, chunks.tile, gpu.CHANNELS)
  (outputs,) = scan_kernel(
    _backward_kernel,
    operands,
    chunks,
    (_backward_results(inputs, u, delta, chunks),),
    scratch_types={
      "products_ref": plgpu.SMEM((gpu.ROWS_SUMMED, gpu.CHANNELS), jnp.float32),
      **gpu.outlet("du_tiles_ref", tile, u.dtype),
      **gpu.outlet("ddelta_tiles_ref", tile, delta.dtype),
    },
    name="selective_scan_backward",
  )(inputs)
  du, ddelta, dB, parameters, dbefore = outputs
  dB = dB[..., : chunks.tile * chunks.states]
  dB = dB.reshape(batch, gpu.blocks(channels), -1, chunks.states)[:, :, :length]
  return (
    du[:, :length, :channels],
    ddelta[:, :length, :channels],
    jnp.swapaxes(dB, 0, 1),
    parameters.reshape(-1, *parameters.shape[2:])[..., :channels],
    dbefore[:, 0, :, :channels].mT,
  )


def _backward_results(inputs, u, delta, chunks):
  """Returns the types of the backward kernel's results."""
  batch, blocks = len(u), gpu.blocks(u.shape[-1])
  shape = chunks.room(inputs.u_ref.shape)
  sums = chunks.states + 1 + bool(inputs.skip_refs)
  return _Outputs(
    du_ref=jax.ShapeDtypeStruct(shape, u.dtype),
    ddelta_ref=jax.ShapeDtypeStruct(shape, delta.dtype),
    dB_ref=jax.ShapeDtypeStruct(
      (batch, blocks, chunks.tiles, gpu.ROWS_SUMMED), jnp.float32
    ),
    dparams_ref=jax.ShapeDtypeStruct(
      (batch, chunks.count, sums, blocks * gpu.CHANNELS), jnp.float32
    ),
    dbefore_ref=jax.ShapeDtypeStruct(
      (batch, chunks.count, chunks.states, blocks * gpu.CHANNELS), jnp.float32
    ),
  )


def _backward_kernel(
  inputs: _Inputs, outputs: _Outputs, program, *, products_ref,
  du_tiles_ref=None, ddelta_tiles_ref=None,
):  # fmt: skip
  image, channels = program.image, program.channels
  states = range(program.chunks.states)
  back = _Backward(
    program,
    channels,
    inputs.B_ref,
    inputs.first_ref,
    outputs,
    products_ref,
    (du_tiles_ref, ddelta_tiles_ref),
    a=[inputs.A_ref[n, channels] for n in states],
    shift=inputs.bias_ref[0, channels],
    skip=[D_ref[0, channels] for D_ref in inputs.skip_refs[:1]],
  )

  # Scan the chunk in reverse, from the adjoint after it.
  carry = (
    [
      gpu.vector(inputs.after_ref[image, program.chunk, n, channels])
      for n in states
    ],
    _Sums(
      [gpu.zeros() for _ in states],
      gpu.zeros(),
      [gpu.zeros() for _ in back.skip],
    ),
  )
  adjoint, (dA, dbias, dD) = for_tiles(
    back.scan_tile,
    (
      inputs.u_ref,
      inputs.delta_ref,
      inputs.h_ref,
      inputs.dh_ref,
      *inputs.skip_refs[1:],
    ),
    program,
    carry,
    reverse=True,
    last_of=(inputs.h_ref,),
  )

  # Store what has been summed over the chunk.
  gpu.finish()
  for index, total in enumerate((*dA, dbias, *dD)):
    outputs.dparams_ref[image, program.chunk, index, channels] = total
  for n in states:
    outputs.dbefore_ref[image, program.chunk, n, channels] = adjoint[n]


class _Backward(NamedTuple):
  """What the backward kernel needs for each tile.

  Attributes:
    program: what the program computes.
    channels: slice of its channels.
    B_ref: [B, N, L].
    first_ref: [B, N, D], the state before the first token.
    outputs: see `_Outputs`.
    products_ref: [`gpu.threads.ROWS_SUMMED`, 128], in shared memory.
    outlets: tiles of du and ddelta to be sent; see `gpu.threads.outlet`.
    a: A, a vector of channels by state.
    shift: the bias, a vector of channels.
    skip: D, a vector of channels, or nothing.
  """

  program: Program
  channels: Any
  B_ref: Any
  first_ref: Any
  outputs: _Outputs
  products_ref: Any
  outlets: tuple[Any, Any]
  a: list[Array]
  shift: Array
  skip: list[Array]

  def scan_tile(self, tile, u, delta, h, dh, *rest):
    """Returns the adjoint before a tile, and the sums with its part.

    Args:
      tile: index of the tile.
      u: [tile, 128], like all that follow.
      delta: see above.
      h: the states, by token and state.
      dh: their cotangents.
      *rest: with a skip dy; the token before the tile, of `h`; and the adjoint
        after the tile with the sums so far.
    """
    *dy, before, (adjoint, (dA, dbias, dD)) = rest
    program, states = self.program, range(len(self.a))
    start = [
      gpu.vector(self.first_ref[program.image, n, self.channels])
      for n in states
    ]
    before = [jnp.where(tile > 0, before[0, n], start[n]) for n in states]
    size, first = program.chunks.tile, tile * program.chunks.tile
    targets = [
      ref.at[program.image, pl.ds(first, size), self.channels]
      for ref in (self.outputs.du_ref, self.outputs.ddelta_ref)
    ]
    du_ref, ddelta_ref = tile_refs = [
      gpu.place(outlet, tile % 2, target)
      for outlet, target in zip(self.outlets, targets, strict=True)
    ]
    xs, raw = load_tile(u, delta, self.shift, size)
    dts = [gpu.softplus(x) for x in raw]

    # Scan in reverse, into the tiles that were sent the time before last.
    gpu.wait_sent(2)
    for j in reversed(range(size)):
      x, dt = xs[j], dts[j]
      ddt, dx = jnp.zeros_like(x), jnp.zeros_like(x)
      for n in states:
        dstate = dh[j, n] + adjoint[n]
        adjoint[n] = jnp.exp(dt * self.a[n]) * dstate
        ddecay = adjoint[n] * (h[j - 1, n] if j else before[n])
        drive = dstate * self.B_ref[program.image, n, first + j]
        ddt += ddecay * self.a[n] + drive * x
        dx += drive * dt
        dA[n] += ddecay * dt
        self.products_ref[j * len(states) + n] = dstate * (dt * x)
      for cotangent, D in zip(dy, self.skip, strict=True):
        g = cotangent[j].astype(jnp.float32)
        dx += D * g
        dD = [dD[0] + g * x]
      draw = ddt * gpu.sigmoid(raw[j])
      dbias += draw
      du_ref[j] = dx.astype(du_ref.dtype)
      ddelta_ref[j] = draw.astype(ddelta_ref.dtype)

    # Sum over channels for B, and send the tiles.
    dB_ref = self.outputs.dB_ref.at[program.image, program.block, tile]
    gpu.store_channel_sums(self.products_ref, dB_ref)
    for tile_ref, target in zip(tile_refs, targets, strict=True):
      gpu.send(tile_ref, target)
    gpu.commit()
    return adjoint, _Sums(dA, dbias, dD)
