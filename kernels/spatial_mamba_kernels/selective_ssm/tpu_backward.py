"""The backward pass of the selective SSM as a TPU kernel.

Rows are processed from the last to the first. A step recomputes the states of a
row from the state that the forward pass saved after the row before. Then it
scans the row's cotangents in reverse.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.selective_ssm.plans import row_length
from spatial_mamba_kernels.selective_ssm.tpu_forward import (
  Inputs,
  before,
  specs,
)
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.plan import Cut
from spatial_mamba_kernels.tpu.scan import (
  Cotangents,
  RowBackward,
  columns,
  into,
  scan_row,
)
from spatial_mamba_kernels.typing import Array


@dataclasses.dataclass(frozen=True)
class _Padded:
  """A row [W, b, D] whose memory is undefined from column `end` on.

  There it reads as zero, which adds nothing to any sum.
  """

  ref: Any
  end: Any

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the row."""
    return self.ref.shape

  def __getitem__(self, index: Any) -> Array:
    """Reads some lanes of a column, in float32."""
    x = self.ref[index].astype(jnp.float32)
    return jnp.where(index[0] < self.end, x, 0)


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


def backward(
  arrays: Inputs, saved: Array, g: Array, *, cut: Cut
) -> tuple[Array, ...]:
  """Computes the cotangents of all arguments.

  Cotangents of the parameters are summed over a group of images, those of B
  and C over a block of channels.

  Args:
    arrays: what the forward pass was given.
    saved: [K, N, G, b, D], the state after each row.
    g: [L, G, b, D], the cotangents of y.
    cut: see `tpu.plan.Cut`.

  Returns:
    du, ddelta [L, G, b, D]; dB, dC [K, H, N, G, b, Wp], K blocks; and those of
    A, the bias and D, [G, N + 2, D].
  """
  u, delta, _, B, *_ = arrays
  length, groups, group, channels = u.shape
  height, states, *_, lanes = B.shape
  blocks = -(-channels // cut.block)
  projection = jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32)
  results = _Outputs(
    du_ref=jax.ShapeDtypeStruct(u.shape, u.dtype),
    ddelta_ref=jax.ShapeDtypeStruct(u.shape, delta.dtype),
    dB_ref=projection,
    dC_ref=projection,
    dparams_ref=jax.ShapeDtypeStruct(
      (groups, states + 2, channels), jnp.float32
    ),
  )

  def row(step):
    return height - 1 - step

  tokens, in_specs = specs(arrays, cut, row)
  projection = rows.partial_token_spec(states, cut, lanes, row)
  state = (states, group, cut.block)
  read = max(height - 1, 1), *saved.shape[1:]
  (cotangents,) = pl.pallas_call(
    partial(_backward_kernel, length=length, channels=channels),
    grid=(groups, blocks, height),
    in_specs=(in_specs, rows.image_spec(states, cut, before(row)), tokens),
    out_specs=(
      _Outputs(
        tokens, tokens, projection, projection, rows.sums_spec(states + 2, cut)
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
      (*arrays, jax.ShapeDtypeStruct(read, saved.dtype), g),
      results,
      flops=12 + 24 * states,
      transcendentals=5 + 2 * states,
    ),
    name="selective_ssm_backward",
  )(arrays, saved, g)
  return cotangents


def _backward_kernel(
  inputs: Inputs,
  before_ref,
  g_ref,
  outputs: _Outputs,
  scratch: _Scratch,
  *,
  length,
  channels,
):
  step, last = pl.program_id(2), pl.num_programs(2) - 1
  width, _, block = g_ref.shape
  states = scratch.h_ref.shape[1]
  inside = rows.inside(channels, block)
  if length % width:
    end = length - (last - step) * width
    u_ref, delta_ref, g_ref = (
      _Padded(x, end) for x in (inputs.u_ref, inputs.delta_ref, g_ref)
    )
    inputs = inputs._replace(u_ref=u_ref, delta_ref=delta_ref)

  # Nothing follows the last row of a sequence: its adjoint is zero.
  @pl.when(step == 0)
  def _():
    scratch.adjoint_ref[...] = jnp.zeros_like(scratch.adjoint_ref)
    scratch.sums_ref[...] = jnp.zeros_like(scratch.sums_ref)

  # Recompute the states of the row.
  has_before = step < last
  scratch.carry_ref[...] = jnp.where(has_before, before_ref[...], 0)
  scan_row(inputs.row, scratch.carry_ref, into(scratch.h_ref))

  # Scan the cotangents from the row's last token to its first.
  outputs.dB_ref[...] = jnp.zeros_like(outputs.dB_ref)
  outputs.dC_ref[...] = jnp.zeros_like(outputs.dC_ref)
  scan = RowBackward(
    inputs.row,
    h_ref=scratch.h_ref,
    before_ref=before_ref,
    has_before=has_before,
    dh=_observed(inputs.C_ref, g_ref),
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
      return inputs.D_ref[:, lanes] * dy

    _observe_backward(
      inputs.u_ref, g_ref, outputs.dC_ref, scratch, lanes, inside
    )
    scan.scan(lanes, skip)

  rows.for_lanes(block, of_lanes)

  # After the first row, the sums over all rows are complete.
  @pl.when(step == last)
  def _():
    outputs.dparams_ref[...] = jnp.sum(scratch.sums_ref[...], axis=1)


def _observed(C_ref, g_ref) -> Cotangents:
  """Returns the cotangents C * dy of a row's states."""

  def cotangents(first, lanes):
    c = columns(C_ref, first)

    def dh(j, n):
      dy = g_ref[first + j, :, lanes].astype(jnp.float32)
      return c[n][:, j : j + 1] * dy

    return dh

  return cotangents


def _observe_backward(u_ref, g_ref, dC_ref, scratch, lanes, inside):
  """Accumulates the cotangents of D and of a row's C."""
  h_ref = scratch.h_ref
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
