"""A row of the selective scan in TPU kernels, forward and backward.

See `tpu.rows` for how arrays lie.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.activations import softplus
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.typing import Array


def scan_row(u, delta, A, B, bias, carry, out):
  """Scans a row on from `carry`, which it replaces.

  Args:
    u: reference to [W, b, D], as all of these.
    delta: [W, b, D].
    A: [N, D].
    B: [N, b, Wp].
    bias: [1, D].
    carry: [N, b, D], the state before the row, then after it.
    out: [W, N, b, D], the states.
  """
  width, _, channels = u.shape
  states = A.shape[0]

  def scan(lanes):
    def tile(first, size, h):
      b = columns(B, first)
      for j in range(size):
        x = u[first + j, :, lanes].astype(jnp.float32)
        dt = softplus(_time_step(delta, bias, first + j, lanes))
        h = tuple(
          jnp.exp(dt * A[pl.ds(n, 1), lanes]) * h[n]
          + (dt * x) * b[n][:, j : j + 1]
          for n in range(states)
        )
        for n in range(states):
          out[first + j, n, :, lanes] = h[n]
      return h

    h = tuple(carry[n, :, lanes] for n in range(states))
    h = rows.for_tiles(width, tile, h, states=states)
    for n in range(states):
      carry[n, :, lanes] = h[n]

  rows.for_lanes(channels, scan)


def scan_row_backward(
  u, delta, A, B, bias, h, before, has_before, dh, adjoint,
  du, ddelta, dB, sums, lanes, inside,
  skip: Callable[[Any], Array] | None = None,
):  # fmt: skip
  """From the cotangents of a row's states back to all that made them.

  Args:
    u: reference to [W, b, D], as all of these unless said otherwise.
    delta: [W, b, D].
    A: [N, D].
    B: [N, b, Wp].
    bias: [1, D].
    h: [W, N, b, D], the states.
    before: [N, b, D], the state before the row.
    has_before: a boolean; without, the row is the first.
    dh: [W, N, b, D], the cotangents of the states.
    adjoint: [N, b, D], what flows back from the row after, then from this one.
    du: [W, b, D], written.
    ddelta: [W, b, D], written.
    dB: [N, b, Wp], added to.
    sums: [N + 1, b, D], added to: the cotangents of A and the bias.
    lanes: index of the lanes to be computed.
    inside: see `tpu.rows.inside`.
    skip: column -> what else flows back to `u` there.
  """
  width, states, _, _ = dh.shape

  def previous(first, n):
    above = jnp.where(has_before, before[n, :, lanes], 0)
    left = h[jnp.maximum(first - 1, 0), n, :, lanes]
    return jnp.where(first > 0, left, above)

  def tile(first, size, flow):
    b = columns(B, first)
    dA, dbias = [None] * states, None
    products = [[] for _ in range(states)]
    for j in reversed(range(size)):
      x = u[first + j, :, lanes].astype(jnp.float32)
      before_softplus = _time_step(delta, bias, first + j, lanes)
      dt = softplus(before_softplus)
      ddt: Any = None
      dx: Any = skip(first + j) if skip else None
      into = []
      for n in range(states):
        a = A[pl.ds(n, 1), lanes]
        decay = jnp.exp(dt * a)
        adjoint_n = dh[first + j, n, :, lanes] + flow[n]
        into.append(decay * adjoint_n)
        ddecay = into[n] * (
          h[first + j - 1, n, :, lanes] if j else previous(first, n)
        )
        drive = adjoint_n * b[n][:, j : j + 1]
        ddt = rows.add(ddt, ddecay * a + drive * x)
        dx = rows.add(dx, drive * dt)
        dA[n] = rows.add(dA[n], ddecay * dt)
        products[n].insert(0, adjoint_n * (dt * x))
      flow = tuple(into)
      dbefore = ddt * jax.nn.sigmoid(before_softplus)
      du[first + j, :, lanes] = dx.astype(du.dtype)
      ddelta[first + j, :, lanes] = dbefore.astype(ddelta.dtype)
      dbias = rows.add(dbias, dbefore)
    for place, total in enumerate((*dA, dbias)):
      sums[place, :, lanes] += total
    for n in range(states):
      dB[n] += rows.lane_sums(products[n], first, dB.shape[1:], lanes, inside)
    return flow

  flow = tuple(adjoint[n, :, lanes] for n in range(states))
  flow = rows.for_tiles(width, tile, flow, states=states, reverse=True)
  for n in range(states):
    adjoint[n, :, lanes] = flow[n]


def columns(per_token, first) -> list[Array]:
  """The numbers of a tile's tokens, for each state, its first column first."""
  return [
    rows.columns_from(per_token[n].astype(jnp.float32), first)
    for n in range(per_token.shape[0])
  ]


def _time_step(delta, bias, column, lanes):
  """The time step before softplus."""
  return delta[column, :, lanes].astype(jnp.float32) + bias[:, lanes]
