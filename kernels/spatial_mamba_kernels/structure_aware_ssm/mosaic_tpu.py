"""The structure-aware SSM on TPUs: a kernel for each pass.

`tpu_rows` describes the layout of arrays.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels import tpu_rows as rows
from spatial_mamba_kernels.by_platform import Arrays, Kernel, Passes
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE
from spatial_mamba_kernels.structure_aware_ssm.dimensions import IMAGE, NUMBERS
from spatial_mamba_kernels.structure_aware_ssm.tpu_backward import backward
from spatial_mamba_kernels.structure_aware_ssm.tpu_forward import (
  REACH,
  STENCIL,
  WINDOW,
  Operands,
  forward,
)
from spatial_mamba_kernels.typing import Array


def plan(arrays: Arrays) -> rows.Cut:
  """Returns the cut for the backward pass, which needs the most VMEM."""
  u, delta, A, *_ = arrays
  batch, _, width, channels = u.shape
  states = A.shape[1]
  itemsize = max(u.dtype.itemsize, delta.dtype.itemsize)

  kept = WINDOW + STENCIL.cotangent_rows + 1

  def bytes_of(group, lanes):
    state_row = states * rows.image_row_bytes(width, group, lanes, 4)
    image_row = rows.image_row_bytes(width, group, lanes, itemsize)
    lane_rows = states * rows.lane_row_bytes(width, group)
    count = len(STENCIL.taps) + 4 * states + 2
    numbers = rows.numbers_bytes(count, group, lanes)
    # Two buffers for each row of inputs and outputs: three images and two
    # cotangents.
    buffers = 2 * (5 * image_row + 5 * lane_rows)
    return kept * state_row + 3 * (REACH + 1) * image_row + buffers + numbers

  keeps = f"{kept} rows of {width} tokens and {states} states"
  return rows.cut(arrays, batch, channels, bytes_of, keeps=keeps)


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns y [B, H, W, D] on one device and, if `save`, each row's last state.

  The last states are [H, N, B, D].
  """
  cut = plan(arrays)
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
  cut = plan(arrays)
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


def _finish(arrays, sums):
  du, ddelta, dB, dC, parameters = sums
  taps, states = len(STENCIL.taps), dB.shape[-1]
  dweights, dA, (dbias, dD) = jnp.split(
    jnp.sum(parameters, axis=0), (taps, taps + states)
  )
  _, unmerge = jax.vjp(STENCIL.merge, *arrays[6:8])
  dB, dC = jnp.sum(dB, axis=0), jnp.sum(dC, axis=0)
  return du, ddelta, dA.T, dB, dC, dD, *unmerge(dweights), dbias


KERNEL = Kernel(
  plan,
  Passes(run_forward, run_backward),
  _finish,
  sums=(
    IMAGE,
    IMAGE,
    (CHANNELS, *NUMBERS),
    (CHANNELS, *NUMBERS),
    (BATCH, WHOLE, CHANNELS),
  ),
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
