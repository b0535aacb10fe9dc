"""The selective scan of one row of tokens within a TPU kernel.

Arrays are float32 but for `u`, `delta`, their cotangents and B; `tpu.rows`
describes their layout.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.activations import softplus
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.typing import Array


class Row(NamedTuple):
  """References to the inputs of the scan of one row.

  Attributes:
    u_ref: [W, b, D].
    delta_ref: [W, b, D].
    B_ref: [N, b, Wp].
    A_ref: [N, D].
    bias_ref: [1, D].
  """

  u_ref: Any
  delta_ref: Any
  B_ref: Any
  A_ref: Any
  bias_ref: Any

  def raw_time_step(self, column: Any, lanes: Any) -> Array:
    """Returns the time step before softplus."""
    delta = self.delta_ref[column, :, lanes].astype(jnp.float32)
    return delta + self.bias_ref[:, lanes]


# Takes the first column of a tile and its lanes. Returns a function of column j
# of the tile, the token [b, lanes] and its N states.
Consumer = Callable[[Any, Any], Callable[[int, Array, Sequence[Array]], None]]


def scan_row(row: Row, carry_ref, consumer: Consumer) -> None:
  """Scans a row.

  Args:
    row: its inputs.
    carry_ref: [N, b, D], the state before the row; the state after it replaces
      that.
    consumer: called with the states of each token.
  """
  width, _, channels = row.u_ref.shape
  states = row.A_ref.shape[0]

  def scan(lanes):
    def tile(first, size, h):
      b = columns(row.B_ref, first)
      consume = consumer(first, lanes)
      for j in range(size):
        x = row.u_ref[first + j, :, lanes].astype(jnp.float32)
        dt = softplus(row.raw_time_step(first + j, lanes))
        h = tuple(
          jnp.exp(dt * row.A_ref[pl.ds(n, 1), lanes]) * h[n]
          + (dt * x) * b[n][:, j : j + 1]
          for n in range(states)
        )
        consume(j, x, h)
      return h

    h = tuple(carry_ref[n, :, lanes] for n in range(states))
    h = rows.for_tiles(width, tile, h, states=states)
    for n in range(states):
      carry_ref[n, :, lanes] = h[n]

  rows.for_lanes(channels, scan)


def into(out_ref) -> Consumer:
  """Returns a consumer that writes all states to [W, N, b, D]."""

  def consumer(first, lanes):
    def write(j, x, h):
      del x
      for n, state in enumerate(h):
        out_ref[first + j, n, :, lanes] = state

    return write

  return consumer


# Takes the first column of a tile and its lanes. Returns a function of column j
# of the tile and of state n: the cotangent [b, lanes] of this state.
Cotangents = Callable[[Any, Any], Callable[[int, int], Array]]


def stored(dh_ref) -> Cotangents:
  """Returns the cotangents of states that are in memory, [W, N, b, D]."""

  def cotangents(first, lanes):
    return lambda j, n: dh_ref[first + j, n, :, lanes]

  return cotangents


class RowBackward(NamedTuple):
  """The transpose of `scan_row`, and the references that it takes.

  Attributes:
    row: the row's inputs.
    h_ref: [W, N, b, D], the states.
    before_ref: [N, b, D], the state before the row.
    has_before: a boolean; False for the first row, whose scan begins at zero.
    dh: the cotangents of the states.
    adjoint_ref: [N, b, D], the cotangent that the row after passes on to the
      state after this row; replaced by the one for the state before it.
    du_ref: [W, b, D], written.
    ddelta_ref: [W, b, D], written.
    dB_ref: [N, b, Wp], accumulated.
    sums_ref: [N + 1, b, D], accumulated: the cotangents of A and the bias.
    inside: see `tpu.rows.inside`.
  """

  row: Row
  h_ref: Any
  before_ref: Any
  has_before: Any
  dh: Cotangents
  adjoint_ref: Any
  du_ref: Any
  ddelta_ref: Any
  dB_ref: Any
  sums_ref: Any
  inside: Any

  def scan(
    self, lanes: Any, skip: Callable[[Any], Array] | None = None
  ) -> None:
    """Scans the cotangents of some lanes in reverse.

    Args:
      lanes: index of the lanes.
      skip: column -> cotangent that `u` has from elsewhere.
    """
    width, states, _, _ = self.h_ref.shape

    def tile(first, size, adjoint):
      return self._scan_tile(first, size, adjoint, lanes, skip)

    adjoint = tuple(self.adjoint_ref[n, :, lanes] for n in range(states))
    adjoint = rows.for_tiles(width, tile, adjoint, states=states, reverse=True)
    for n in range(states):
      self.adjoint_ref[n, :, lanes] = adjoint[n]

  def _scan_tile(self, first, size, adjoint, lanes, skip):
    """Returns the adjoint before the tile, given that after it."""
    row, states = self.row, len(adjoint)
    b = columns(row.B_ref, first)
    dh_of = self.dh(first, lanes)
    dA: list[Any] = [None] * states
    dbias = None
    products = [[] for _ in range(states)]

    # Write du and ddelta token by token, and accumulate the rest in registers.
    for j in reversed(range(size)):
      x = row.u_ref[first + j, :, lanes].astype(jnp.float32)
      raw = row.raw_time_step(first + j, lanes)
      dt = softplus(raw)
      ddt: Any = None
      dx: Any = skip(first + j) if skip else None
      passed_on = []
      for n in range(states):
        a = row.A_ref[pl.ds(n, 1), lanes]
        decay = jnp.exp(dt * a)
        dh = dh_of(j, n) + adjoint[n]
        passed_on.append(decay * dh)
        ddecay = passed_on[n] * self._state_before(first, j, n, lanes)
        drive = dh * b[n][:, j : j + 1]
        ddt = rows.add(ddt, ddecay * a + drive * x)
        dx = rows.add(dx, drive * dt)
        dA[n] = rows.add(dA[n], ddecay * dt)
        products[n].insert(0, dh * (dt * x))
      adjoint = tuple(passed_on)
      draw = ddt * jax.nn.sigmoid(raw)
      self.du_ref[first + j, :, lanes] = dx.astype(self.du_ref.dtype)
      self.ddelta_ref[first + j, :, lanes] = draw.astype(self.ddelta_ref.dtype)
      dbias = rows.add(dbias, draw)

    # Once a tile, add the parameters' cotangents and sum B's over channels.
    for index, total in enumerate((*dA, dbias)):
      self.sums_ref[index, :, lanes] += total
    for n in range(states):
      self.dB_ref[n] += rows.lane_sums(
        products[n], first, self.dB_ref.shape[1:], lanes, self.inside
      )
    return adjoint

  def _state_before(self, first, j, n, lanes):
    """Returns the state before column j of a tile."""
    if j:
      return self.h_ref[first + j - 1, n, :, lanes]
    above = jnp.where(self.has_before, self.before_ref[n, :, lanes], 0)
    left = self.h_ref[jnp.maximum(first - 1, 0), n, :, lanes]
    return jnp.where(first > 0, left, above)


def columns(per_token_ref: Any, first: Any) -> list[Array]:
  """Returns [b, Wp] for each state, rotated so that column `first` is first."""
  return [
    rows.columns_from(per_token_ref[n].astype(jnp.float32), first)
    for n in range(per_token_ref.shape[0])
  ]
