"""The selective scan in plain JAX, for every platform XLA compiles for.

States are [B, L, N, D] here, so that the channels, which are many, lie along
the vector lanes.
"""

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.activations import softplus
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.recurrence import (
  linear_recurrence,
  recurrence_backward,
)
from spatial_mamba_kernels.shapes import state_dtype, with_rank_of
from spatial_mamba_kernels.typing import Array, Float


def states(
  u: Float[Array, "B L D"],
  delta: Float[Array, "B L D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B L N"],
  delta_bias: Float[Array, " D"],
  h0: Float[Array, "B D N"] | None = None,
  *,
  implementation: str | None,
) -> Float[Array, "B L N D"]:
  """Discretises and scans; `selective_scan` states the equations."""
  decay, drive = _discretise(u, delta, A, B, delta_bias)
  first = None if h0 is None else h0.mT.astype(drive.dtype)
  return linear_recurrence(decay, drive, first, implementation)


def _discretise(u, delta, A, B, delta_bias):
  dtype = state_dtype(u, delta, A, B)
  u, delta, A, B = (x.astype(dtype) for x in (u, delta, A, B))
  dt = softplus(delta + with_rank_of(delta, delta_bias.astype(dtype)))
  dt_of_states = dt[:, :, None]
  decay = jnp.exp(dt_of_states * with_rank_of(dt_of_states, A.T))
  return decay, _outer(dt * u, B)


def _outer(x: Array, y: Array) -> Array:
  """Returns the outer product [..., N, D] of [..., D] and [..., N]."""
  # For N = 1 the cotangent's sum over channels leaves an axis of size 1 in the
  # general form, which takes a CPU 30 times as long.
  if y.shape[-1] == 1:
    return (x * y)[..., None, :]
  return x[..., None, :] * y[..., None]


def saving_states(arrays: Arrays, *, save: bool) -> Arrays:
  """Runs the forward pass. The backward pass needs only its result."""
  del save
  return (states(*arrays, implementation=None),)


def from_saved_states(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Runs the backward pass from saved states, without recomputing them."""
  *arguments, h0 = arrays
  (decay, drive), pullback = jax.vjp(_discretise, *arguments)
  residuals = decay, h0.mT.astype(drive.dtype), *saved
  ddecay, ddrive, dfirst = recurrence_backward(None, residuals, g)
  assert dfirst is not None
  return *pullback((ddecay, ddrive)), dfirst.mT.astype(h0.dtype)
