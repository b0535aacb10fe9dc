"""The selective scan as TPU kernels.

Tokens are scanned in rows of about a hundred. The backward pass goes from the
last row to the first: it recomputes a row's states from the state before the
row, then scans the row's cotangents in reverse. `tpu.rows` describes the
layout of arrays.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.selective_scan.plans import tpu_plan
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.plan import row_length
from spatial_mamba_kernels.tpu.scan import (
  Row,
  RowBackward,
  into,
  scan_row,
  stored,
)
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns the states [B, L, N, D] on one device."""
  del save  # The result is all that the backward pass needs.
  cut = tpu_plan(arrays)
  batch, length, _ = arrays[0].shape
  h = forward(*_lay_out(arrays, cut), cut=cut)
  return (rows.join_tokens(rows.states_of(h, batch), length),)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Returns cotangents on one device, partial sums for B and the parameters.

  Returns:
    du, ddelta [B, L, D]; dB [K, B, L, N], to be summed over K; the cotangents
    of A and delta_bias, [G, N + 1, D], to be summed over G; dh0 [B, D, N].
  """
  (h,) = saved
  cut = tpu_plan(arrays)
  batch, length, _ = arrays[0].shape
  h, g = (rows.split_tokens(x, row_length(length)) for x in (h, g))
  # The state before each row: h0, then the last one of the row above.
  h0 = arrays[-1].mT.astype(jnp.float32)
  before = jnp.concatenate([h0[:, None], h[:, :-1, -1]], axis=1)
  u, delta, A, B, bias, _ = _lay_out(arrays, cut)
  du, ddelta, dB, parameters, dh0 = backward(
    u,
    delta,
    A,
    B,
    bias,
    rows.last_state_rows_of(before.transpose(1, 2, 0, 3), cut.group),
    rows.state_rows_of(g, cut.group),
    cut=cut,
  )
  tokens_of = partial(rows.tokens_of, batch=batch, width=row_length(length))
  return (
    rows.join_tokens(rows.images_of(du, batch), length),
    rows.join_tokens(rows.images_of(ddelta, batch), length),
    jax.vmap(lambda x: rows.join_tokens(tokens_of(x), length))(dB),
    parameters,
    rows.last_states_of(dh0, batch)[0].transpose(1, 2, 0),
  )


def _lay_out(arrays, cut):
  """Returns the operator's arguments in the layout of `forward`."""
  u, delta, A, B, bias, h0 = arrays
  u, delta, B = (
    rows.split_tokens(x, row_length(u.shape[1])) for x in (u, delta, B)
  )
  return (
    rows.rows_of(u, cut.group),
    rows.rows_of(delta, cut.group),
    A.astype(jnp.float32).T,
    rows.lane_rows_of(B, cut.group),
    bias.astype(jnp.float32)[None],
    rows.last_state_rows_of(
      h0.astype(jnp.float32).transpose(2, 0, 1)[None], cut.group
    ),
  )


class _Inputs(NamedTuple):
  """References to the inputs of the backward kernel; also their blocks.

  `before_ref` has the state before the row. For the others see `Row`.
  """

  u_ref: Any
  delta_ref: Any
  g_ref: Any
  B_ref: Any
  before_ref: Any
  A_ref: Any
  bias_ref: Any


class _Outputs(NamedTuple):
  """References to the results of the backward kernel; also their blocks."""

  du_ref: Any
  ddelta_ref: Any
  dB_ref: Any
  dparams_ref: Any
  dh0_ref: Any


class _Scratch(NamedTuple):
  """References to the backward kernel's scratch, float32.

  Attributes:
    h_ref: [W, N, b, D], the recomputed states of the row.
    carry_ref: [N, b, D], the state before the row, then after it.
    adjoint_ref: [N, b, D], the cotangent that the row after passes on.
    sums_ref: [N + 1, b, D], the accumulated cotangents of A and the bias.
  """

  h_ref: Any
  carry_ref: Any
  adjoint_ref: Any
  sums_ref: Any


def forward(u, delta, A, B, bias, h0, *, cut):
  """Returns the states, [H, W, N, G, b, D].

  Args:
    u: [H, W, G, b, D].
    delta: [H, W, G, b, D].
    A: [N, D], float32.
    B: [H, N, G, b, Wp].
    bias: [1, D], float32.
    h0: [1, N, G, b, D], float32.
    cut: see `tpu.plan.Cut`.
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]

  def row(step):
    return step

  image = rows.image_spec(width, cut, row)
  arguments = Row(u, delta, B, A, bias), h0
  h = jax.ShapeDtypeStruct(
    (height, width, states, groups, group, channels), jnp.float32
  )
  return pl.pallas_call(
    _forward_kernel,
    grid=(groups, -(-channels // cut.block), height),
    in_specs=(
      Row(
        u_ref=image,
        delta_ref=image,
        B_ref=rows.token_spec(states, cut, B.shape[-1], row),
        A_ref=rows.parameter_spec(states, cut),
        bias_ref=rows.parameter_spec(1, cut),
      ),
      rows.image_spec(states, cut, _first),
    ),
    out_specs=rows.state_spec(width, states, cut, row),
    out_shape=h,
    scratch_shapes=[pltpu.VMEM((states, group, cut.block), jnp.float32)],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      (*arguments[0], h0), h, flops=2 + 5 * states, transcendentals=2 + states
    ),
    name="selective_scan_forward",
  )(*arguments)


def _first(step):
  """The only block of what is before the first row."""
  del step
  return 0


def _forward_kernel(row: Row, h0_ref, h_ref, carry_ref):
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = h0_ref[...]

  scan_row(row, carry_ref, into(h_ref))


def backward(u, delta, A, B, bias, before, g, *, cut):
  """Computes the cotangents of the arguments of `forward`.

  `before` is the state before each row, [H, N, G, b, D]; `g` the cotangents of
  all states, [H, W, N, G, b, D]. Cotangents of the parameters are summed over
  a group of images, those of B over a block of channels.

  Returns:
    du, ddelta [H, W, G, b, D]; dB [K, H, N, G, b, Wp], K blocks; the cotangents
    of A and the bias, [G, N + 1, D]; and dh0 [1, N, G, b, D].
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]
  blocks = -(-channels // cut.block)
  arguments = _Inputs(u, delta, g, B, before, A, bias)
  results = _Outputs(
    du_ref=jax.ShapeDtypeStruct(u.shape, u.dtype),
    ddelta_ref=jax.ShapeDtypeStruct(u.shape, delta.dtype),
    dB_ref=jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32),
    dparams_ref=jax.ShapeDtypeStruct(
      (groups, states + 1, channels), jnp.float32
    ),
    dh0_ref=jax.ShapeDtypeStruct((1, *before.shape[1:]), jnp.float32),
  )
  in_specs, out_specs = _backward_specs(height, width, states, B.shape[-1], cut)
  state = (states, group, cut.block)
  (cotangents,) = pl.pallas_call(
    partial(_backward_kernel, height=height, channels=channels),
    grid=(groups, blocks, height),
    in_specs=(in_specs,),
    out_specs=(out_specs,),
    out_shape=(results,),
    scratch_shapes=(
      _Scratch(
        h_ref=pltpu.VMEM((width, *state), jnp.float32),
        carry_ref=pltpu.VMEM(state, jnp.float32),
        adjoint_ref=pltpu.VMEM(state, jnp.float32),
        sums_ref=pltpu.VMEM((states + 1, group, cut.block), jnp.float32),
      ),
    ),
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments, results, flops=8 + 21 * states, transcendentals=5 + 2 * states
    ),
    name="selective_scan_backward",
  )(arguments)
  return cotangents


def _backward_specs(height, width, states, lanes, cut):
  """Returns the blocks of inputs and results of the backward kernel."""

  def row(step):
    return height - 1 - step

  image = rows.image_spec(width, cut, row)
  in_specs = _Inputs(
    u_ref=image,
    delta_ref=image,
    g_ref=rows.state_spec(width, states, cut, row),
    B_ref=rows.token_spec(states, cut, lanes, row),
    before_ref=rows.image_spec(states, cut, row),
    A_ref=rows.parameter_spec(states, cut),
    bias_ref=rows.parameter_spec(1, cut),
  )
  out_specs = _Outputs(
    du_ref=image,
    ddelta_ref=image,
    dB_ref=rows.partial_token_spec(states, cut, lanes, row),
    dparams_ref=rows.sums_spec(states + 1, cut),
    dh0_ref=rows.image_spec(states, cut, _first),
  )
  return in_specs, out_specs


def _backward_kernel(
  inputs: _Inputs, outputs: _Outputs, scratch: _Scratch, *, height, channels
):
  step = pl.program_id(2)
  u_ref, delta_ref, g_ref, B_ref, before_ref, A_ref, bias_ref = inputs
  row = Row(u_ref, delta_ref, B_ref, A_ref, bias_ref)
  block = u_ref.shape[-1]
  inside = rows.inside(channels, block)

  # Nothing follows the last row of an image: its adjoint is zero.
  @pl.when(step == 0)
  def _():
    scratch.adjoint_ref[...] = jnp.zeros_like(scratch.adjoint_ref)
    scratch.sums_ref[...] = jnp.zeros_like(scratch.sums_ref)

  # Recompute the states of the row.
  scratch.carry_ref[...] = before_ref[...]
  scan_row(row, scratch.carry_ref, into(scratch.h_ref))

  # Scan the cotangents from the row's last token to its first.
  outputs.dB_ref[...] = jnp.zeros_like(outputs.dB_ref)
  backward_row = RowBackward(
    row,
    h_ref=scratch.h_ref,
    before_ref=before_ref,
    has_before=True,
    dh=stored(g_ref),
    adjoint_ref=scratch.adjoint_ref,
    du_ref=outputs.du_ref,
    ddelta_ref=outputs.ddelta_ref,
    dB_ref=outputs.dB_ref,
    sums_ref=scratch.sums_ref,
    inside=inside,
  )
  rows.for_lanes(block, backward_row.scan)

  # After the first row, the sums over all rows are complete.
  @pl.when(step == height - 1)
  def _():
    outputs.dparams_ref[...] = jnp.sum(scratch.sums_ref[...], axis=1)
    outputs.dh0_ref[...] = scratch.adjoint_ref[...]
