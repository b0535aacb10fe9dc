"""The structure-aware SSM on TPUs: a kernel for each pass.

`tpu.rows` describes the layout of arrays.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL, tpu_plan
from spatial_mamba_kernels.structure_aware_ssm.tpu_backward import backward
from spatial_mamba_kernels.structure_aware_ssm.tpu_forward import (
  Operands,
  forward,
)
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns y [B, H, W, D] on one device and, if `save`, each row's last state.

  The last states are [H, N, B, D].
  """
  cut = tpu_plan(arrays)
  batch = len(arrays[0])
  y, *saved = forward(_lay_out(arrays, cut), save=save, cut=cut)
  return (
    rows.images_of(y, batch),
    *(rows.last_states_of(x, batch) for x in saved),
  )


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Returns cotangents on one device, partial sums for all but u and delta.

  Returns:
    du, ddelta [B, H, W, D]; dB, dC [K, B, H, W, N], to be summed over K; and
    those of the merged weights, A, delta_bias and D, [G, T + N + 2, D], to be
    summed over G.
  """
  cut = tpu_plan(arrays)
  du, ddelta, dB, dC, parameters = backward(
    _lay_out(arrays, cut),
    rows.last_state_rows_of(saved[0], cut.group),
    rows.rows_of(g, cut.group),
    cut=cut,
  )
  batch, _, width, _ = g.shape
  tokens_of = jax.vmap(partial(rows.tokens_of, batch=batch, width=width))
  return (
    rows.images_of(du, batch),
    rows.images_of(ddelta, batch),
    tokens_of(dB),
    tokens_of(dC),
    parameters,
  )


def _lay_out(arrays, cut):
  """Returns the operator's arguments in the layout of the kernels."""
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  return Operands(
    u=rows.rows_of(u, cut.group),
    delta=rows.rows_of(delta, cut.group),
    A=A.astype(jnp.float32).T,
    B=rows.lane_rows_of(B, cut.group),
    C=rows.lane_rows_of(C, cut.group),
    D=D.astype(jnp.float32)[None],
    weights=STENCIL.merge(kernels, alpha),
    bias=bias.astype(jnp.float32)[None],
  )
