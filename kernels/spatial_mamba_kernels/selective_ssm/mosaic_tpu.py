"""The selective SSM on TPUs: a kernel for each pass, whose states stay in VMEM.

Tokens are scanned in rows of about a hundred. `tpu.rows` describes the layout
of arrays, but for arrays of tokens, which are [L, G, b, D] here: the last row
may extend beyond token L.
"""

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.selective_ssm.plans import row_length, tpu_plan
from spatial_mamba_kernels.selective_ssm.tpu_backward import backward
from spatial_mamba_kernels.selective_ssm.tpu_forward import Inputs, forward
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.typing import Array, Float


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns y [B, L, D] on one device and, if `save`, the saved states.

  These are [K, N, B, D] for K segments. The state after row r is at index r.
  Entries from the last row on are undefined.
  """
  cut = tpu_plan(arrays)
  batch = len(arrays[0])
  y, *saved = forward(_lay_out(arrays, cut), save=save, cut=cut)
  return (_sequences(y, batch), *(rows.last_states_of(x, batch) for x in saved))


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Returns cotangents on one device, partial sums for all but u and delta.

  Returns:
    du, ddelta [B, L, D]; dB, dC [K, B, L, N], to be summed over K; and those of
    A, delta_bias and D, [G, N + 2, D], to be summed over G.
  """
  cut = tpu_plan(arrays)
  batch, length, _ = g.shape
  du, ddelta, dB, dC, parameters = backward(
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


def _lay_out(arrays, cut) -> Inputs:
  """Returns the operator's arguments in the layout of the kernels."""
  u, delta, A, B, C, D, bias = arrays

  def lane_rows(x):
    x = rows.split_tokens(x, row_length(x.shape[1]))
    return rows.lane_rows_of(x, cut.group)

  return Inputs(
    u_ref=_tokens(u, cut.group),
    delta_ref=_tokens(delta, cut.group),
    A_ref=A.astype(jnp.float32).T,
    B_ref=lane_rows(B),
    C_ref=lane_rows(C),
    D_ref=D.astype(jnp.float32)[None],
    bias_ref=bias.astype(jnp.float32)[None],
  )


def _tokens(x: Float[Array, "B L D"], group: int) -> Float[Array, "L G b D"]:
  return rows.rows_of(x[:, None], group)[0]


def _sequences(x: Float[Array, "L G b D"], batch: int) -> Float[Array, "B L D"]:
  """Inverts `_tokens`, for so many images."""
  return rows.images_of(x[None], batch)[:, 0]
