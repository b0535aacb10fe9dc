"""The selective scan as TPU kernels, and the row of it that others use.

Tokens are scanned in rows of some hundred. Backward, rows come from the last to
the first: each is scanned anew from the state before it, then its cotangents
flow back. See `tpu_rows` for how arrays lie.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels import tpu_rows as rows
from spatial_mamba_kernels.by_platform import Arrays, Kernel, Passes
from spatial_mamba_kernels.selective_scan.dimensions import SUMS, finish
from spatial_mamba_kernels.selective_scan.xla import softplus
from spatial_mamba_kernels.typing import Array


def plan(arrays: Arrays) -> rows.Cut:
  """See `tpu_rows.cut`; the backward pass needs the most."""
  u, delta, A, *_ = arrays
  batch, length, channels = u.shape
  states, width = A.shape[1], row_length(length)
  itemsize = max(u.dtype.itemsize, delta.dtype.itemsize)

  def bytes_of(group, lanes):
    image_row = rows.image_row_bytes(width, group, lanes, itemsize)
    lane_rows = states * rows.lane_row_bytes(width, group)
    state_row = states * rows.image_row_bytes(width, group, lanes, 4)
    numbers = rows.numbers_bytes(2 * (states + 1), group, lanes)
    # The row computed anew, and two of each that comes or goes.
    return 3 * state_row + 2 * (4 * image_row + 2 * lane_rows) + numbers

  keeps = f"3 rows of {width} tokens and {states} states"
  return rows.cut(arrays, batch, channels, bytes_of, keeps=keeps)


def row_length(length: int) -> int:
  """Tokens a row: many, and a divisor of all if there is one."""
  longest = min(length, rows.CONFIG.row)
  for width in range(longest, longest // 2, -1):
    if length % width == 0:
      return width
  return longest


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The states [B, L, N, D] on one device."""
  del save  # The result is all that the backward pass needs.
  cut = plan(arrays)
  batch, length, _ = arrays[0].shape
  h = forward(*_lay_out(arrays, cut), cut=cut)
  return (_from_rows(rows.states_of(h, batch), length),)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Cotangents on one device; those of parameters as sums over some images.

  Returns:
    du, ddelta [B, L, D]; dB [K, B, L, N], to be summed over K; and
    [G, N + 1, D], to be summed over G: of A and delta_bias.
  """
  (h,) = saved
  cut = plan(arrays)
  batch, length, _ = arrays[0].shape
  h, g = (_to_rows(x, row_length(length)) for x in (h, g))
  ends = h[:, :, -1].transpose(1, 2, 0, 3)
  du, ddelta, dB, parameters = backward(
    *_lay_out(arrays, cut),
    rows.last_state_rows_of(ends, cut.group),
    rows.state_rows_of(g, cut.group),
    cut=cut,
  )
  tokens_of = partial(rows.tokens_of, batch=batch, width=row_length(length))
  return (
    _from_rows(rows.images_of(du, batch), length),
    _from_rows(rows.images_of(ddelta, batch), length),
    jax.vmap(lambda x: _from_rows(tokens_of(x), length))(dB),
    parameters,
  )


KERNEL = Kernel(
  plan,
  Passes(run_forward, run_backward),
  finish,
  SUMS,
)


def _to_rows(x, width):
  """[B, L, ...] to [B, H, W, ...], filled up with zeros."""
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, -x.shape[1] % width)
  return jnp.pad(x, padding).reshape(x.shape[0], -1, width, *x.shape[2:])


def _from_rows(x, length):
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _lay_out(arrays, cut):
  u, delta, A, B, bias = arrays
  u, delta, B = (_to_rows(x, row_length(u.shape[1])) for x in (u, delta, B))
  return (
    rows.rows_of(u, cut.group),
    rows.rows_of(delta, cut.group),
    A.astype(jnp.float32).T,
    rows.lane_rows_of(B, cut.group),
    bias.astype(jnp.float32)[None],
  )


def forward(u, delta, A, B, bias, *, cut):
  """Returns the states, [H, W, N, G, b, D].

  u and delta are [H, W, G, b, D]; B [H, N, G, b, Wp]; A [N, D] and bias [1, D]
  float32.
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]

  def row(step):
    return step

  arguments = (u, delta, B, A, bias)
  h = jax.ShapeDtypeStruct(
    (height, width, states, groups, group, channels), jnp.float32
  )
  return pl.pallas_call(
    _forward_kernel,
    grid=(groups, -(-channels // cut.block), height),
    in_specs=[
      rows.image_spec(width, cut, row),
      rows.image_spec(width, cut, row),
      rows.token_spec(states, cut, B.shape[-1], row),
      rows.parameter_spec(states, cut),
      rows.parameter_spec(1, cut),
    ],
    out_specs=rows.state_spec(width, states, cut, row),
    out_shape=h,
    scratch_shapes=[pltpu.VMEM((states, group, cut.block), jnp.float32)],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments, h, flops=2 + 5 * states, transcendentals=2 + states
    ),
    name="selective_scan_forward",
  )(*arguments)


def _forward_kernel(u, delta, B, A, bias, h, carry):
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry[...] = jnp.zeros_like(carry)

  scan_row(u, delta, A, B, bias, carry, h)


def backward(u, delta, A, B, bias, saved, g, *, cut):
  """Cotangents of all that `forward` was given, from those of the states.

  Those of the parameters are sums over a group of images, those of B over a
  block of channels.

  Returns:
    du, ddelta [H, W, G, b, D]; dB [K, H, N, G, b, Wp], K blocks; and
    [G, N + 1, D]: those of A and the bias.
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]
  blocks = -(-channels // cut.block)

  def row(step):
    return height - 1 - step

  def above(step):
    return jnp.maximum(height - 2 - step, 0)

  image = rows.image_spec(width, cut, row)
  sums = states + 1
  arguments = (u, delta, g, B, saved, A, bias)
  results = [
    jax.ShapeDtypeStruct(u.shape, u.dtype),
    jax.ShapeDtypeStruct(u.shape, delta.dtype),
    jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32),
    jax.ShapeDtypeStruct((groups, sums, channels), jnp.float32),
  ]
  return pl.pallas_call(
    partial(_backward_kernel, height=height, channels=channels),
    grid=(groups, blocks, height),
    in_specs=[
      image,
      image,
      rows.state_spec(width, states, cut, row),
      rows.token_spec(states, cut, B.shape[-1], row),
      rows.image_spec(states, cut, above),
      rows.parameter_spec(states, cut),
      rows.parameter_spec(1, cut),
    ],
    out_specs=[
      image,
      image,
      rows.partial_token_spec(states, cut, B.shape[-1], row),
      rows.sums_spec(sums, cut),
    ],
    out_shape=results,
    scratch_shapes=[
      pltpu.VMEM((width, states, group, cut.block), jnp.float32),
      pltpu.VMEM((states, group, cut.block), jnp.float32),
      pltpu.VMEM((states, group, cut.block), jnp.float32),
      pltpu.VMEM((sums, group, cut.block), jnp.float32),
    ],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments, results, flops=8 + 21 * states, transcendentals=5 + 2 * states
    ),
    name="selective_scan_backward",
  )(*arguments)


def _backward_kernel(
  u, delta, g, B, above, A, bias, du, ddelta, dB, dparams,
  h, carry, adjoint, sums, *, height, channels,
):  # fmt: skip
  s = pl.program_id(2)
  has_above = s < height - 1
  inside = rows.inside(channels, u.shape[-1])

  @pl.when(s == 0)
  def _():
    adjoint[...] = jnp.zeros_like(adjoint)
    sums[...] = jnp.zeros_like(sums)

  carry[...] = jnp.where(has_above, above[...], 0)
  scan_row(u, delta, A, B, bias, carry, h)
  dB[...] = jnp.zeros_like(dB)

  def scan(lanes):
    scan_row_backward(
      u, delta, A, B, bias, h, above, has_above, g, adjoint, du, ddelta, dB,
      sums, lanes, inside,
    )  # fmt: skip

  rows.for_lanes(u.shape[-1], scan)

  @pl.when(s == height - 1)
  def _():
    dparams[...] = jnp.sum(sums[...], axis=1)


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
    inside: see `tpu_rows.inside`.
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
