"""What the GPU kernels of both passes of the selective SSM share.

A program goes over an image segment by segment, for 128 channels; a tile of
`gpu.tiles` is a segment. Its states are in registers only, a piece of the
segment at a time.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from spatial_mamba_kernels.gpu import scan
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.tiles import Chunks, Program
from spatial_mamba_kernels.selective_ssm.plans import SEGMENT, piece
from spatial_mamba_kernels.typing import Array

LOG2_E = math.log2(math.e)


class Inputs(NamedTuple):
  """References to the inputs of both kernels; also the arrays themselves.

  Attributes:
    u_ref: [B, L, D], padded like `delta_ref`.
    delta_ref: [B, L, D].
    A_ref: [N, D].
    B_ref: [B, L, N], float32 and padded like `C_ref`.
    C_ref: [B, L, N].
    D_ref: [1, D].
    bias_ref: [1, D].
  """

  u_ref: Any
  delta_ref: Any
  A_ref: Any
  B_ref: Any
  C_ref: Any
  D_ref: Any
  bias_ref: Any

  @classmethod
  def of(cls, arrays: tuple[Array, ...], chunks: Chunks) -> "Inputs":
    """Lays out the operator's arguments."""
    u, delta, A, B, C, D, bias = arrays
    return cls(
      chunks.pad(u),
      chunks.pad(delta),
      gpu.parameters(A.T),
      chunks.pad_tokens(B.astype(jnp.float32)),
      chunks.pad_tokens(C.astype(jnp.float32)),
      gpu.parameters(D[None]),
      gpu.parameters(bias[None]),
    )


def chunks_of(u: Array, A: Array) -> Chunks:
  """Returns how tokens are cut: chunks of whole segments."""
  states = A.shape[1]
  return Chunks.of(u, A, SEGMENT, piece(states))


def carry_between_chunks(
  arrays: tuple[Array, ...], chunks: Chunks, *dy: Array
) -> tuple[Array, ...]:
  """Returns the state before each chunk, [B, K, N, D], or nothing for one.

  Args:
    arrays: the operator's arguments.
    chunks: how the tokens are cut.
    *dy: the cotangents of y, for the adjoint after each chunk.
  """
  if chunks.count == 1:
    return ()
  u, delta, A, B, C, _, bias = arrays
  operands = scan.lay_out(u, delta, A, B, bias, chunks)
  dh = [
    x for g in dy for x in (chunks.pad(g), scan.numbers_by_state(C, chunks))
  ]
  first = scan.first_state(operands)
  return (
    scan.carry_between_chunks(
      operands, chunks, first, dh, name="selective_ssm"
    ),
  )


def state_of_chunk(states_refs: tuple[Any, ...], program: Program):
  """Loads what `carry_between_chunks` returned for a program."""
  states = range(program.chunks.states)
  for ref in states_refs:
    own_ref = ref.at[program.image, program.chunk, :, program.channels]
    return [gpu.vector(own_ref[n]) for n in states]
  return [gpu.zeros() for _ in states]


class Piece(NamedTuple):
  """A piece of a segment, by token.

  Attributes:
    tokens: indices of its tokens in the image, for B and C.
    xs: u.
    raw: time steps before softplus.
    dts: time steps.
    b: B, numbers by state.
    decays: of the states, by state.
    states: by state; the first is the one before the piece.
  """

  tokens: list[Any]
  xs: list[Array]
  raw: list[Array]
  dts: list[Array]
  b: list[list[Any]]
  decays: list[list[Array]]
  states: list[list[Array]]


class Scan(NamedTuple):
  """The recurrence of a program's channels.

  Attributes:
    program: what the program computes.
    inputs: see `Inputs`.
    a: A, a vector of channels by state.
    shift: the bias, a vector of channels.
    skip: D, a vector of channels.
  """

  program: Program
  inputs: Inputs
  a: list[Array]
  shift: Array
  skip: Array

  @classmethod
  def of(cls, inputs: Inputs, program: Program) -> "Scan":
    """Loads the parameters of its channels."""
    channels = program.channels
    return cls(
      program,
      inputs,
      [inputs.A_ref[n, channels] for n in range(program.chunks.states)],
      inputs.bias_ref[0, channels],
      inputs.D_ref[0, channels],
    )

  def scan_piece(
    self, tile: Any, index: Any, u: Any, delta: Any, state: list[Array]
  ) -> Piece:
    """Scans a piece of a tile from the state before it."""
    chunks = self.program.chunks
    first = index * chunks.piece
    xs, raw = scan.load_tile(u, delta, self.shift, chunks.piece, first)
    tokens = [tile * chunks.tile + first + j for j in range(chunks.piece)]
    b = [self.numbers(self.inputs.B_ref, token) for token in tokens]
    dts = [gpu.softplus(x) for x in raw]
    decays = [self.decays(dt) for dt in dts]
    states = [state]
    for x, dt, decay, numbers in zip(xs, dts, decays, b, strict=True):
      drive = x * dt
      states.append(
        [
          factor * h + drive * number
          for factor, h, number in zip(decay, states[-1], numbers, strict=True)
        ]
      )
    return Piece(tokens, xs, raw, dts, b, decays, states)

  def decays(self, dt: Array) -> list[Array]:
    """Returns exp(dt * A), by state."""
    # One product less for each state than by `exp`.
    doublings = dt * LOG2_E
    return [jnp.exp2(doublings * a) for a in self.a]

  def numbers(self, ref: Any, token: Any) -> list[Any]:
    """Returns a token's B or C, by state."""
    image = self.program.image
    return [ref[image, token, n] for n in range(len(self.a))]
