"""The selective SSM as TPU kernels, whose states stay in VMEM.

Tokens are scanned in rows of about a hundred. The forward pass saves the state
before each row. The backward pass goes from the last row to the first: it
recomputes a row's states from the saved one, then scans the row's cotangents in
reverse. `tpu.rows` describes the layout of arrays; those of tokens are
[L, G, b, D] here, and the last row may extend beyond L.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.selective_ssm.plans import (
  row_length,
  saved_states,
  tpu_plan,
)
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.scan import (
  Consumer,
  Row,
  RowBackward,
  columns,
  into,
  scan_row,
)
from spatial_mamba_kernels.typing import Array, Float


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns y [B, L, D] on one device and, if `save`, the saved states.

  These are [K, N, B, D] for K segments. The state before row r is at index r;
  where there are more segments than rows, the last entries are undefined.
  """
  cut = tpu_plan(arrays)
  batch = len(arrays[0])
  y, *saved = _forward(_lay_out(arrays, cut), save=save, cut=cut)
  return (_sequences(y, batch), *(rows.last_states_of(x, batch) for x in saved))


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Returns cotangents on one device, partial sums for all but u and delta.

  Returns:
    du, ddelta [B, L, D]; dB, dC [K, B, L, N], to be summed over K; and those of
    A, delta_bias and D, [G, N + 2, D], to be summed over G.
  """
  cut = tpu_plan(arrays)
  batch, length, _ = g.shape
  du, ddelta, dB, dC, parameters = _backward(
    _lay_out(arrays, cut),
    rows.last_state_rows_of(saved[0], cut.group),
    _tokens(g, cut.group),
    cut=cut,
  )

  def numbers(x):
    x = rows.tokens_of(x, batch, row_length(length))
    return rows.join_tokens(x, length)

  return (
    _sequences(du, batch),
    _sequences(ddelta, batch),
    jax.vmap(numbers)(dB),
    jax.vmap(numbers)(dC),
    parameters,
  )


class _Operands(NamedTuple):
  """The operator's arguments as the kernels take them, or references to them.

  Attributes:
    u: [L, G, b, D]; of a row [W, b, D].
    delta: as `u`.
    A: [N, D], float32.
    B: [H, N, G, b, Wp]; of a row [N, b, Wp].
    C: as `B`.
    D: [1, D], float32.
    bias: [1, D], float32.
  """

  u: Any
  delta: Any
  A: Any
  B: Any
  C: Any
  D: Any
  bias: Any

  @property
  def row(self) -> Row:
    """The inputs of the scan of a row."""
    return Row(self.u, self.delta, self.B, self.A, self.bias)


def _lay_out(arrays, cut) -> _Operands:
  u, delta, A, B, C, D, bias = arrays

  def lane_rows(x):
    x = rows.split_tokens(x, row_length(x.shape[1]))
    return rows.lane_rows_of(x, cut.group)

  return _Operands(
    u=_tokens(u, cut.group),
    delta=_tokens(delta, cut.group),
    A=A.astype(jnp.float32).T,
    B=lane_rows(B),
    C=lane_rows(C),
    D=D.astype(jnp.float32)[None],
    bias=bias.astype(jnp.float32)[None],
  )


def _tokens(x: Float[Array, "B L D"], group: int) -> Float[Array, "L G b D"]:
  return rows.rows_of(x[:, None], group)[0]


def _sequences(x: Float[Array, "L G b D"], batch: int) -> Float[Array, "B L D"]:
  """Inverts `_tokens`, for so many images."""
  return rows.images_of(x[None], batch)[:, 0]


def _specs(operands: _Operands, cut, row_of):
  """Returns the blocks for a row of tokens, and for all operands."""
  states, lanes = operands.A.shape[0], operands.B.shape[-1]
  width = row_length(len(operands.u))
  tokens = pl.BlockSpec(
    (width, None, cut.group, cut.block),
    lambda i, c, step: (row_of(step), i, 0, c),
  )
  numbers = rows.token_spec(states, cut, lanes, row_of)
  return tokens, _Operands(
    u=tokens,
    delta=tokens,
    A=rows.parameter_spec(states, cut),
    B=numbers,
    C=numbers,
    D=rows.parameter_spec(1, cut),
    bias=rows.parameter_spec(1, cut),
  )


def _forward(operands: _Operands, *, save, cut):
  """Returns y and, if `save`, the state before each row, [K, N, G, b, D]."""
  length, groups, group, channels = operands.u.shape
  states = operands.A.shape[0]

  def row(step):
    return step

  tokens, in_specs = _specs(operands, cut, row)
  out_specs = [tokens]
  out_shape = [jax.ShapeDtypeStruct(operands.u.shape, operands.u.dtype)]
  if save:
    out_specs.append(rows.image_spec(states, cut, row))
    shape = (saved_states(length, states), states, groups, group, channels)
    out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  (results,) = pl.pallas_call(
    _forward_kernel,
    grid=(groups, -(-channels // cut.block), len(operands.B)),
    in_specs=(in_specs,),
    out_specs=(out_specs,),
    out_shape=(out_shape,),
    scratch_shapes=[pltpu.VMEM((states, group, cut.block), jnp.float32)],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      operands, out_shape, flops=3 + 7 * states, transcendentals=2 + states
    ),
    name="selective_ssm_forward",
  )(operands)
  return results


def _forward_kernel(inputs: _Operands, outputs, carry_ref):
  y_ref, *saved_refs = outputs

  # The state before the first row is zero.
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = jnp.zeros_like(carry_ref)

  for saved_ref in saved_refs:
    saved_ref[...] = carry_ref[...]
  scan_row(inputs.row, carry_ref, _observer(inputs, y_ref))


def _observer(inputs: _Operands, y_ref) -> Consumer:
  """Returns a consumer of states that writes y = C * states + D * u."""

  def consumer(first, lanes):
    c = columns(inputs.C, first)

    def write(j, x, h):
      y = inputs.D[:, lanes] * x
      for n, state in enumerate(h):
        y += c[n][:, j : j + 1] * state
      y_ref[first + j, :, lanes] = y.astype(y_ref.dtype)

    return write

  return consumer


class _Inputs(NamedTuple):
  """References to the inputs of the backward kernel; also their blocks.

  `before_ref` has the state before the row.
  """

  operands: _Operands
  before_ref: Any
  g_ref: Any


class _Outputs(NamedTuple):
  """References to the results of the backward kernel; also their blocks.

  `dparams_ref` has the cotangents of A, the bias and D.
  """

  du_ref: Any
  ddelta_ref: Any
  dB_ref: Any
  dC_ref: Any
  dparams_ref: Any


class _Scratch(NamedTuple):
  """References to the backward kernel's scratch, float32.

  Attributes:
    h_ref: [W, N, b, D], the recomputed states of the row.
    carry_ref: [N, b, D], the state before the row, then after it.
    adjoint_ref: [N, b, D], the cotangent that the row after passes on.
    sums_ref: [N + 2, b, D], the accumulated cotangents of A, the bias and D.
  """

  h_ref: Any
  carry_ref: Any
  adjoint_ref: Any
  sums_ref: Any


def _backward(operands: _Operands, saved, g, *, cut) -> _Outputs:
  """Computes the cotangents of all operands.

  Cotangents of the parameters are summed over a group of images, those of B
  and C over a block of channels.

  Returns:
    du, ddelta [L, G, b, D]; dB, dC [K, H, N, G, b, Wp], K blocks; and those of
    A, the bias and D, [G, N + 2, D].
  """
  length, groups, group, channels = operands.u.shape
  height, states, *_, lanes = operands.B.shape
  blocks = -(-channels // cut.block)
  arguments = _Inputs(operands, saved, g)
  numbers = jax.ShapeDtypeStruct((blocks, *operands.B.shape), jnp.float32)
  results = _Outputs(
    du_ref=jax.ShapeDtypeStruct(g.shape, operands.u.dtype),
    ddelta_ref=jax.ShapeDtypeStruct(g.shape, operands.delta.dtype),
    dB_ref=numbers,
    dC_ref=numbers,
    dparams_ref=jax.ShapeDtypeStruct(
      (groups, states + 2, channels), jnp.float32
    ),
  )

  def row(step):
    return height - 1 - step

  tokens, operand_specs = _specs(operands, cut, row)
  dnumbers = rows.partial_token_spec(states, cut, lanes, row)
  before = rows.image_spec(states, cut, row)
  state = (states, group, cut.block)
  (cotangents,) = pl.pallas_call(
    partial(_backward_kernel, length=length, channels=channels),
    grid=(groups, blocks, height),
    in_specs=(_Inputs(operand_specs, before, tokens),),
    out_specs=(
      _Outputs(
        tokens, tokens, dnumbers, dnumbers, rows.sums_spec(states + 2, cut)
      ),
    ),
    out_shape=(results,),
    scratch_shapes=(
      _Scratch(
        h_ref=pltpu.VMEM((row_length(length), *state), jnp.float32),
        carry_ref=pltpu.VMEM(state, jnp.float32),
        adjoint_ref=pltpu.VMEM(state, jnp.float32),
        sums_ref=pltpu.VMEM((states + 2, group, cut.block), jnp.float32),
      ),
    ),
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      (*operands, saved, g),
      results,
      flops=12 + 24 * states,
      transcendentals=5 + 2 * states,
    ),
    name="selective_ssm_backward",
  )(arguments)
  return cotangents


def _backward_kernel(
  inputs: _Inputs, outputs: _Outputs, scratch: _Scratch, *, length, channels
):
  step = pl.program_id(2)
  operands, before_ref, g_ref = inputs
  width, _, block = g_ref.shape
  states = scratch.h_ref.shape[1]
  inside = rows.inside(channels, block)

  # Nothing follows the last row of a sequence: its adjoint is zero. Where the
  # row extends beyond the last token, memory is undefined: a cotangent and a
  # token of zero add nothing to any sum.
  @pl.when(step == 0)
  def _():
    scratch.adjoint_ref[...] = jnp.zeros_like(scratch.adjoint_ref)
    scratch.sums_ref[...] = jnp.zeros_like(scratch.sums_ref)
    if length % width:

      @pl.loop(length % width, width)
      def _(column):
        for ref in (operands.u, operands.delta, g_ref):
          ref[column] = jnp.zeros_like(ref[column])

  # Recompute the states of the row.
  scratch.carry_ref[...] = before_ref[...]
  scan_row(operands.row, scratch.carry_ref, into(scratch.h_ref))

  # Scan the cotangents from the row's last token to its first.
  outputs.dB_ref[...] = jnp.zeros_like(outputs.dB_ref)
  outputs.dC_ref[...] = jnp.zeros_like(outputs.dC_ref)
  scan = RowBackward(
    operands.row,
    h_ref=scratch.h_ref,
    before_ref=before_ref,
    has_before=True,
    dh=_observed(operands.C, g_ref),
    adjoint_ref=scratch.adjoint_ref,
    du_ref=outputs.du_ref,
    ddelta_ref=outputs.ddelta_ref,
    dB_ref=outputs.dB_ref,
    sums_ref=scratch.sums_ref.at[pl.ds(0, states + 1)],
    inside=inside,
  )

  def of_lanes(lanes):
    def skip(column):
      dy = g_ref[column, :, lanes].astype(jnp.float32)
      return operands.D[:, lanes] * dy

    _observe_backward(inputs, outputs.dC_ref, scratch, lanes, inside)
    scan.scan(lanes, skip)

  rows.for_lanes(block, of_lanes)

  # After the first row, the sums over all rows are complete.
  @pl.when(step == pl.num_programs(2) - 1)
  def _():
    outputs.dparams_ref[...] = jnp.sum(scratch.sums_ref[...], axis=1)


def _observed(C_ref, g_ref):
  """Returns the cotangents C * dy of a row's states."""

  def cotangents(first, lanes):
    c = columns(C_ref, first)

    def dh(j, n):
      dy = g_ref[first + j, :, lanes].astype(jnp.float32)
      return c[n][:, j : j + 1] * dy

    return dh

  return cotangents


def _observe_backward(inputs: _Inputs, dC_ref, scratch, lanes, inside):
  """Accumulates the cotangents of D and of a row's C."""
  u_ref, g_ref, h_ref = inputs.operands.u, inputs.g_ref, scratch.h_ref
  width, states, *_ = h_ref.shape
  dD_ref = scratch.sums_ref.at[states + 1]

  def of_tile(first, size, total):
    products: list[list[Array]] = [[] for _ in range(states)]
    for j in range(size):
      dy = g_ref[first + j, :, lanes].astype(jnp.float32)
      total += dy * u_ref[first + j, :, lanes].astype(jnp.float32)
      for n in range(states):
        products[n].append(dy * h_ref[first + j, n, :, lanes])
    for n in range(states):
      dC_ref[n] += rows.lane_sums(
        products[n], first, dC_ref.shape[1:], lanes, inside
      )
    return total

  dD_ref[:, lanes] = rows.for_tiles(
    width, of_tile, dD_ref[:, lanes], states=states
  )
