"""The backward pass of the structure-aware SSM as a TPU kernel.

Rows are processed from the last to the first. A step recomputes the states of
row r from the state that the forward pass saved after the row above. Then all
rows are there that the cotangents of row r + 5 depend on, which the same step
computes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.structure_aware_ssm.tpu_forward import (
  REACH,
  WINDOW,
  Operands,
)
from spatial_mamba_kernels.taps import clip
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.fusion import (
  CotangentRing,
  Tile,
  Window,
  states_backward,
  weights_backward_tile,
)
from spatial_mamba_kernels.tpu.scan import (
  Row,
  RowBackward,
  columns,
  into,
  scan_row,
  stored,
)
from spatial_mamba_kernels.typing import Array

TAPS = len(STENCIL.taps)


class _Inputs(NamedTuple):
  """References to the kernel's inputs; also their blocks and the arrays.

  All are of the row that is recomputed, but for `B_finished_ref`, which is of
  the row whose cotangents are computed, and `above_ref`, the state before the
  row that is recomputed.
  """

  u_ref: Any
  delta_ref: Any
  g_ref: Any
  B_ref: Any
  B_finished_ref: Any
  C_ref: Any
  above_ref: Any
  A_ref: Any
  D_ref: Any
  weights_ref: Any
  bias_ref: Any


class _Outputs(NamedTuple):
  """References to the kernel's results; also their blocks and the arrays.

  `dparams_ref` has the cotangents of the weights, of A, the bias and D.
  """

  du_ref: Any
  ddelta_ref: Any
  dB_ref: Any
  dC_ref: Any
  dparams_ref: Any


class _Scratch(NamedTuple):
  """References to the kernel's scratch, float32 but for the rows of inputs.

  Attributes:
    ring_ref: [window, W, N, b, D], rows of states.
    dring_ref: a `CotangentRing`.
    u_ring_ref: [reach + 1, W, b, D], rows whose cotangents are not yet
      computed.
    delta_ring_ref: as `u_ring_ref`.
    g_ring_ref: as `u_ring_ref`.
    dh_ref: [W, N, b, D], the cotangents of a row of states.
    carry_ref: [N, b, D], the state before the recomputed row, then after it.
    adjoint_ref: [N, b, D], the cotangent that the row after passes on.
    sums_ref: [T + N + 2, b, D], accumulates `dparams_ref`.
  """

  ring_ref: Any
  dring_ref: Any
  u_ring_ref: Any
  delta_ring_ref: Any
  g_ring_ref: Any
  dh_ref: Any
  carry_ref: Any
  adjoint_ref: Any
  sums_ref: Any

  @property
  def dweights_ref(self) -> Any:
    """The sums of the stencil's weights."""
    return self.sums_ref.at[pl.ds(0, TAPS)]

  @property
  def dscan_ref(self) -> Any:
    """The sums of A and the bias."""
    return self.sums_ref.at[pl.ds(TAPS, self.dh_ref.shape[1] + 1)]

  @property
  def dskip_ref(self) -> Any:
    """The sum of D."""
    return self.sums_ref.at[TAPS + self.dh_ref.shape[1] + 1]


def backward(
  operands: Operands, saved: Array, g: Array, *, cut: rows.Cut
) -> tuple[Array, ...]:
  """Computes the cotangents of all operands.

  Cotangents of the parameters are summed over a group of images, those of B
  and C over a block of channels.

  Args:
    operands: what the forward pass was given.
    saved: [H, N, G, b, D], the state after each row.
    g: [H, W, G, b, D], the cotangents of y.
    cut: see `tpu.plan.Cut`.

  Returns:
    du, ddelta [H, W, G, b, D]; dB, dC [K, H, N, G, b, Wp], K blocks; and those
    of the weights, of A, the bias and D, [G, T + N + 2, D].
  """
  u, delta, A, B, C, D, weights, bias = operands
  height, _, groups, _, channels = u.shape
  states = A.shape[0]
  blocks = -(-channels // cut.block)
  arguments = _Inputs(u, delta, g, B, B, C, saved, A, D, weights, bias)
  results = _Outputs(
    du_ref=jax.ShapeDtypeStruct(u.shape, u.dtype),
    ddelta_ref=jax.ShapeDtypeStruct(u.shape, delta.dtype),
    dB_ref=jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32),
    dC_ref=jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32),
    dparams_ref=jax.ShapeDtypeStruct(
      (groups, TAPS + states + 2, channels), jnp.float32
    ),
  )
  in_specs, out_specs = _specs(operands, cut)
  (cotangents,) = pl.pallas_call(
    partial(_kernel, height=height, channels=channels),
    grid=(groups, blocks, height + REACH),
    in_specs=(in_specs,),
    out_specs=(out_specs,),
    out_shape=(results,),
    scratch_shapes=(_scratch(operands, g.dtype, cut),),
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments,
      results,
      flops=12 + (26 + 6 * TAPS) * states,
      transcendentals=5 + 2 * states,
    ),
    name="structure_aware_ssm_backward",
  )(arguments)
  return cotangents


def _specs(operands, cut):
  """Returns the blocks of the kernel's inputs and results."""
  height, width, *_ = operands.u.shape
  states, lanes = operands.A.shape[0], operands.B.shape[-1]

  def recomputed(step):
    return jnp.maximum(height - 1 - step, 0)

  def above(step):
    return jnp.maximum(height - 2 - step, 0)

  def finished(step):
    return clip(height - 1 - step + REACH, height)

  image = partial(rows.image_spec, width, cut)
  tokens = partial(rows.token_spec, states, cut, lanes)
  dtokens = rows.partial_token_spec(states, cut, lanes, finished)
  in_specs = _Inputs(
    u_ref=image(recomputed),
    delta_ref=image(recomputed),
    g_ref=image(recomputed),
    B_ref=tokens(recomputed),
    B_finished_ref=tokens(finished),
    C_ref=tokens(recomputed),
    above_ref=rows.image_spec(states, cut, above),
    A_ref=rows.parameter_spec(states, cut),
    D_ref=rows.parameter_spec(1, cut),
    weights_ref=rows.parameter_spec(TAPS, cut),
    bias_ref=rows.parameter_spec(1, cut),
  )
  out_specs = _Outputs(
    du_ref=image(finished),
    ddelta_ref=image(finished),
    dB_ref=dtokens,
    dC_ref=dtokens,
    dparams_ref=rows.sums_spec(TAPS + states + 2, cut),
  )
  return in_specs, out_specs


def _scratch(operands, g_dtype, cut):
  _, width, _, group, _ = operands.u.shape
  state = (operands.A.shape[0], group, cut.block)
  inputs = (REACH + 1, width, group, cut.block)
  return _Scratch(
    ring_ref=pltpu.VMEM((WINDOW, width, *state), jnp.float32),
    dring_ref=pltpu.VMEM((STENCIL.cotangent_rows, width, *state), jnp.float32),
    u_ring_ref=pltpu.VMEM(inputs, operands.u.dtype),
    delta_ring_ref=pltpu.VMEM(inputs, operands.delta.dtype),
    g_ring_ref=pltpu.VMEM(inputs, g_dtype),
    dh_ref=pltpu.VMEM((width, *state), jnp.float32),
    carry_ref=pltpu.VMEM(state, jnp.float32),
    adjoint_ref=pltpu.VMEM(state, jnp.float32),
    sums_ref=pltpu.VMEM((TAPS + state[0] + 2, group, cut.block), jnp.float32),
  )


def _kernel(
  inputs: _Inputs, outputs: _Outputs, scratch: _Scratch, *, height, channels
):
  step = pl.program_id(2)
  r = height - 1 - step
  finished = r + REACH
  inside = rows.inside(channels, inputs.u_ref.shape[-1])
  cotangents = CotangentRing(STENCIL, scratch.dring_ref, height)

  # Nothing follows the last row of an image: its adjoint is zero.
  @pl.when(step == 0)
  def _():
    scratch.adjoint_ref[...] = jnp.zeros_like(scratch.adjoint_ref)
    scratch.sums_ref[...] = jnp.zeros_like(scratch.sums_ref)
    cotangents.clear()

  # Recompute row r, if the image has it, and begin its cotangents.
  @pl.when(r >= 0)
  def _():
    _recompute_row(r, inputs, scratch)
    _observe_backward(r, inputs, scratch)

  # Compute the cotangents of the row whose last neighbour this is.
  @pl.when(finished < height)
  def _():
    _finish_row(finished, inputs, outputs, scratch, cotangents, inside)

  # After the first row, the sums over all rows are complete.
  @pl.when(step == height + REACH - 1)
  def _():
    outputs.dparams_ref[...] = jnp.sum(scratch.sums_ref[...], axis=1)


def _recompute_row(r, inputs, scratch):
  """Scans row r, and keeps its inputs until its cotangents are computed."""
  carry_ref = scratch.carry_ref
  carry_ref[...] = jnp.where(r > 0, inputs.above_ref[...], 0)
  row = Row(
    inputs.u_ref,
    inputs.delta_ref,
    inputs.B_ref,
    inputs.A_ref,
    inputs.bias_ref,
  )
  scan_row(row, carry_ref, into(scratch.ring_ref.at[r % WINDOW]))
  for ring_ref, x_ref in (
    (scratch.u_ring_ref, inputs.u_ref),
    (scratch.delta_ring_ref, inputs.delta_ref),
    (scratch.g_ring_ref, inputs.g_ref),
  ):
    ring_ref[r % (REACH + 1)] = x_ref[...]


def _observe_backward(r, inputs, scratch):
  """Stores the cotangents of row r's fused states, and accumulates D's."""
  u_ref, g_ref, C_ref = inputs.u_ref, inputs.g_ref, inputs.C_ref
  dfused_ref, dD_ref = scratch.dring_ref.at[r % WINDOW], scratch.dskip_ref
  width, _, channels = g_ref.shape

  def of_lanes(lanes):
    def of_tile(first, size, total):
      c = columns(C_ref, first)
      for j in range(size):
        dy = g_ref[first + j, :, lanes].astype(jnp.float32)
        total += dy * u_ref[first + j, :, lanes].astype(jnp.float32)
        for n in range(len(c)):
          dfused_ref[first + j, n, :, lanes] = c[n][:, j : j + 1] * dy
      return total

    dD_ref[:, lanes] = rows.for_tiles(
      width, of_tile, dD_ref[:, lanes], states=C_ref.shape[0]
    )

  rows.for_lanes(channels, of_lanes)


def _finish_row(row, inputs, outputs, scratch, cotangents, inside):
  """Writes a row's cotangents, and accumulates those of the parameters."""
  slot, width = row % (REACH + 1), scratch.dh_ref.shape[0]
  dy_ref = scratch.g_ring_ref.at[slot]
  outputs.dB_ref[...] = jnp.zeros_like(outputs.dB_ref)
  outputs.dC_ref[...] = jnp.zeros_like(outputs.dC_ref)
  cotangents.add_border_rows(row)
  slots = STENCIL.slots(row, cotangents.height, WINDOW)
  window = Window(STENCIL, scratch.ring_ref, slots, inputs.weights_ref)
  transposed = window._replace(
    ring_ref=scratch.dring_ref, slots=cotangents.sources(row)
  )
  scan = RowBackward(
    row=Row(
      scratch.u_ring_ref.at[slot],
      scratch.delta_ring_ref.at[slot],
      inputs.B_finished_ref,
      inputs.A_ref,
      inputs.bias_ref,
    ),
    h_ref=window.row_ref(0),
    before_ref=scratch.ring_ref.at[(row - 1) % WINDOW, width - 1],
    has_before=row > 0,
    dh=stored(scratch.dh_ref),
    adjoint_ref=scratch.adjoint_ref,
    du_ref=outputs.du_ref,
    ddelta_ref=outputs.ddelta_ref,
    dB_ref=outputs.dB_ref,
    sums_ref=scratch.dscan_ref,
    inside=inside,
  )

  # From y to the fused states, to the states, to the inputs of the scan.
  def of_lanes(lanes):
    def skip(column):
      d = inputs.D_ref[:, lanes]
      return d * dy_ref[column, :, lanes].astype(jnp.float32)

    _weights_backward(window, dy_ref, outputs.dC_ref, scratch, lanes, inside)
    states_backward(transposed, scratch.dh_ref, lanes)
    scan.scan(lanes, skip)

  rows.for_lanes(inputs.u_ref.shape[-1], of_lanes)


def _weights_backward(window, dy_ref, dC_ref, scratch, lanes, inside):
  """Accumulates the cotangents of the weights and of a row's C."""
  width, states, *_ = scratch.dh_ref.shape
  dfused_ref = scratch.dring_ref.at[window.slots[0]]

  def of_tile(first, size, _):
    def of_state(n, _):
      fused = weights_backward_tile(
        window, Tile(first, size, n, lanes), dfused_ref, scratch.dweights_ref
      )
      products = [
        dy_ref[first + j, :, lanes].astype(jnp.float32) * value
        for j, value in enumerate(fused)
      ]
      dC_ref[n] += rows.lane_sums(
        products, first, dC_ref.shape[1:], lanes, inside
      )

    rows.for_states(states, of_state, None)

  rows.for_tiles(width, of_tile, None)
