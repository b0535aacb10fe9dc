"""The forward pass of the structure-aware SSM as a TPU kernel.

A step scans row r of an image and fuses and observes row r - 5, all of whose
neighbours have then been scanned.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.fusion import (
  Tile,
  Window,
  fuse_tile,
)
from spatial_mamba_kernels.tpu.scan import Row, into, scan_row
from spatial_mamba_kernels.typing import Array

REACH, WINDOW = STENCIL.reach, STENCIL.window


class Operands(NamedTuple):
  """The operator's arguments as the kernels take them; parameters float32.

  Attributes:
    u: [H, W, G, b, D].
    delta: [H, W, G, b, D].
    A: [N, D].
    B: [H, N, G, b, Wp].
    C: [H, N, G, b, Wp].
    D: [1, D].
    weights: [T, D], merged.
    bias: [1, D].
  """

  u: Array
  delta: Array
  A: Array
  B: Array
  C: Array
  D: Array
  weights: Array
  bias: Array


class _Inputs(NamedTuple):
  """References to the kernel's inputs; also their blocks and the arrays.

  All but C are of the row that is scanned, C of the row that is observed.
  """

  u_ref: Any
  delta_ref: Any
  B_ref: Any
  C_ref: Any
  A_ref: Any
  D_ref: Any
  weights_ref: Any
  bias_ref: Any


class _Outputs(NamedTuple):
  """References to y and, if it is saved, the state after each row."""

  y_ref: Any
  saved_ref: Any = None


class _Scratch(NamedTuple):
  """References to the kernel's scratch.

  Attributes:
    ring_ref: [window, W, N, b, D], float32 rows of states.
    u_ring_ref: [reach + 1, W, b, D], rows of `u` that are not yet observed.
    carry_ref: [N, b, D], float32, the state after the last row scanned.
  """

  ring_ref: Any
  u_ring_ref: Any
  carry_ref: Any


def forward(operands: Operands, *, save: bool, cut: rows.Cut) -> list[Array]:
  """Returns y and, if `save`, the state after each row, [H, N, G, b, D]."""
  u, delta, A, B, C, D, weights, bias = operands
  height, width, groups, group, channels = u.shape
  states = A.shape[0]

  def scanned(step):
    return jnp.minimum(step, height - 1)

  def observed(step):
    return jnp.maximum(step - REACH, 0)

  image = partial(rows.image_spec, width, cut)
  tokens = partial(rows.token_spec, states, cut, B.shape[-1])
  arguments = _Inputs(u, delta, B, C, A, D, weights, bias)
  out_specs = [image(observed)]
  out_shape = [jax.ShapeDtypeStruct(u.shape, u.dtype)]
  if save:
    out_specs.append(rows.image_spec(states, cut, scanned))
    shape = (height, states, groups, group, channels)
    out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  state = (states, group, cut.block)
  scratch = _Scratch(
    ring_ref=pltpu.VMEM((WINDOW, width, *state), jnp.float32),
    u_ring_ref=pltpu.VMEM((REACH + 1, width, group, cut.block), u.dtype),
    carry_ref=pltpu.VMEM(state, jnp.float32),
  )
  (results,) = pl.pallas_call(
    partial(_kernel, height=height),
    grid=(groups, -(-channels // cut.block), height + REACH),
    in_specs=(
      _Inputs(
        image(scanned),
        image(scanned),
        tokens(scanned),
        tokens(observed),
        *(rows.parameter_spec(len(x), cut) for x in (A, D, weights, bias)),
      ),
    ),
    out_specs=(out_specs,),
    out_shape=(out_shape,),
    scratch_shapes=(scratch,),
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments,
      out_shape,
      flops=4 + (7 + 2 * len(STENCIL.taps)) * states,
      transcendentals=2 + states,
    ),
    name="structure_aware_ssm_forward",
  )(arguments)
  return results


def _kernel(inputs: _Inputs, outputs: list[Any], scratch: _Scratch, *, height):
  r = pl.program_id(2)
  results = _Outputs(*outputs)
  carry_ref = scratch.carry_ref

  # The state before the first row is zero.
  @pl.when(r == 0)
  def _():
    carry_ref[...] = jnp.zeros_like(carry_ref)

  # Scan row r, if the image has it. Keep its `u`, which is observed later.
  @pl.when(r < height)
  def _():
    scratch.u_ring_ref[r % (REACH + 1)] = inputs.u_ref[...]
    row = Row(
      inputs.u_ref,
      inputs.delta_ref,
      inputs.B_ref,
      inputs.A_ref,
      inputs.bias_ref,
    )
    scan_row(row, carry_ref, into(scratch.ring_ref.at[r % WINDOW]))
    if results.saved_ref is not None:
      results.saved_ref[...] = carry_ref[...]

  # Fuse and observe the row whose last neighbour this is.
  @pl.when(r >= REACH)
  def _():
    _observe_row(r - REACH, inputs, scratch, results.y_ref, height)


def _observe_row(row, inputs, scratch, y_ref, height):
  """Writes y = C * fused + D * u of a row."""
  x_ref = scratch.u_ring_ref.at[row % (REACH + 1)]
  slots = STENCIL.slots(row, height, WINDOW)
  window = Window(STENCIL, scratch.ring_ref, slots, inputs.weights_ref)
  width, _, channels = y_ref.shape

  def of_lanes(lanes):
    def of_tile(first, size, _):
      def add_state(n, total):
        c = rows.columns_from(inputs.C_ref[n].astype(jnp.float32), first)
        fused = fuse_tile(window, Tile(first, size, n, lanes))
        return [
          t + c[:, j : j + 1] * f
          for j, (t, f) in enumerate(zip(total, fused, strict=True))
        ]

      total: list[Array] = [
        inputs.D_ref[:, lanes] * x_ref[first + j, :, lanes].astype(jnp.float32)
        for j in range(size)
      ]
      total = rows.for_states(inputs.A_ref.shape[0], add_state, total)
      for j in range(size):
        y_ref[first + j, :, lanes] = total[j].astype(y_ref.dtype)

    rows.for_tiles(width, of_tile, None)

  rows.for_lanes(channels, of_lanes)
