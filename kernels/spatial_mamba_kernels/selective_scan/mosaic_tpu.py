"""The selective scan as TPU kernels.

Tokens are scanned in rows of some hundred. Backward, rows come from the last to
the first: each is scanned anew from the state before it, then its cotangents
flow back. See `tpu.rows` for how arrays lie.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.selective_scan.plans import row_length, tpu_plan
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.scan import scan_row, scan_row_backward
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The states [B, L, N, D] on one device."""
  del save  # The result is all that the backward pass needs.
  cut = tpu_plan(arrays)
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
  cut = tpu_plan(arrays)
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
