"""The forward pass of the selective SSM as a TPU kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.selective_ssm.plans import row_length, saved_states
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.plan import Cut
from spatial_mamba_kernels.tpu.scan import Consumer, Row, columns, scan_row
from spatial_mamba_kernels.typing import Array


class Inputs(NamedTuple):
  """References to the operator's arguments; also their blocks and the arrays.

  Attributes:
    u_ref: [W, b, D] of a row; the array is [L, G, b, D].
    delta_ref: as `u_ref`.
    A_ref: [N, D], float32.
    B_ref: [N, b, Wp] of a row; the array is [H, N, G, b, Wp].
    C_ref: as `B_ref`.
    D_ref: [1, D], float32.
    bias_ref: [1, D], float32.
  """

  u_ref: Any
  delta_ref: Any
  A_ref: Any
  B_ref: Any
  C_ref: Any
  D_ref: Any
  bias_ref: Any

  @property
  def row(self) -> Row:
    """The inputs of the scan of a row."""
    return Row(
      self.u_ref, self.delta_ref, self.B_ref, self.A_ref, self.bias_ref
    )


def specs(
  arrays: Inputs, cut: Cut, row_of: rows.RowOf
) -> tuple[pl.BlockSpec, Inputs]:
  """Returns the blocks for a row of tokens, and for all inputs."""
  u, _, A, B, *_ = arrays
  states, lanes = A.shape[0], B.shape[-1]
  tokens = pl.BlockSpec(
    (row_length(len(u)), None, cut.group, cut.block),
    lambda i, c, step: (row_of(step), i, 0, c),
  )
  projection = rows.token_spec(states, cut, lanes, row_of)
  return tokens, Inputs(
    u_ref=tokens,
    delta_ref=tokens,
    A_ref=rows.parameter_spec(states, cut),
    B_ref=projection,
    C_ref=projection,
    D_ref=rows.parameter_spec(1, cut),
    bias_ref=rows.parameter_spec(1, cut),
  )


def before(row_of: rows.RowOf) -> rows.RowOf:
  """Returns the index of the saved state before a row; 0 for the first row."""
  return lambda step: jnp.maximum(row_of(step) - 1, 0)


def forward(arrays: Inputs, *, save: bool, cut: Cut) -> list[Array]:
  """Returns y and, if `save`, the state after each row, [K, N, G, b, D]."""
  u, _, A, B, *_ = arrays
  length, groups, group, channels = u.shape
  height, states = len(B), len(A)

  def row(step):
    return step

  def saved(count):
    shape = (count, states, groups, group, channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  tokens, in_specs = specs(arrays, cut, row)
  y = jax.ShapeDtypeStruct(u.shape, u.dtype)
  out_specs, out_shape, written = [tokens], [y], [y]
  if save:
    out_specs.append(rows.image_spec(states, cut, before(row)))
    out_shape.append(saved(saved_states(length)))
    written.append(saved(max(height - 1, 1)))
  (results,) = pl.pallas_call(
    _forward_kernel,
    grid=(groups, -(-channels // cut.block), height),
    in_specs=(in_specs,),
    out_specs=(out_specs,),
    out_shape=(out_shape,),
    scratch_shapes=[pltpu.VMEM((states, group, cut.block), jnp.float32)],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arrays, written, flops=3 + 7 * states, transcendentals=2 + states
    ),
    name="selective_ssm_forward",
  )(arrays)
  return results


def _forward_kernel(inputs: Inputs, outputs, carry_ref):
  y_ref, *saved_refs = outputs

  # The state before the first row is zero.
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry_ref[...] = jnp.zeros_like(carry_ref)

  # Steps 0 and 1 have the same block, which is written after step 1.
  for saved_ref in saved_refs:
    saved_ref[...] = carry_ref[...]
  scan_row(inputs.row, carry_ref, _observer(inputs, y_ref))


def _observer(inputs: Inputs, y_ref) -> Consumer:
  """Returns a consumer of states that writes y = C * states + D * u."""

  def consumer(first, lanes):
    c = columns(inputs.C_ref, first)

    def write(j, x, h):
      y = inputs.D_ref[:, lanes] * x
      for n, state in enumerate(h):
        y += c[n][:, j : j + 1] * state
      y_ref[first + j, :, lanes] = y.astype(y_ref.dtype)

    return write

  return consumer
