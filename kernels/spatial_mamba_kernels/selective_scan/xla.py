"""The selective scan in plain JAX, for every platform XLA compiles for.

States are kept as [B, L, N, D] here: the channels, which are many, lie along
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
  *,
  implementation: str | None,
) -> Float[Array, "B L N D"]:
  """Discretises and scans; `selective_scan` states the equations."""
  decay, drive = _discretise(u, delta, A, B, delta_bias)
  return linear_recurrence(decay, drive, implementation)


def _discretise(u, delta, A, B, delta_bias):
  dtype = state_dtype(u, delta, A, B)
  u, delta, A, B = (x.astype(dtype) for x in (u, delta, A, B))
  dt = softplus(delta + with_rank_of(delta, delta_bias.astype(dtype)))
  dt_of_states = dt[:, :, None]
  decay = jnp.exp(dt_of_states * with_rank_of(dt_of_states, A.T))
  return decay, _outer(dt * u, B)


def _outer(x: Array, numbers: Array) -> Array:
  """[..., D] and [..., N] to [..., N, D]."""
  # A sum over channels that leaves an axis of one, the cotangent's, takes a CPU
  # 30 times as long as one that leaves none.
  if numbers.shape[-1] == 1:
    return (x * numbers)[..., None, :]
  return x[..., None, :] * numbers[..., None]


def saving_states(arrays: Arrays, *, save: bool) -> Arrays:
  """The forward pass; its result is all that the backward pass needs."""
  del save
  return (states(*arrays, implementation=None),)


def from_saved_states(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """The backward pass, without scanning once more."""
  (decay, _), pullback = jax.vjp(_discretise, *arrays)
  return pullback(recurrence_backward(None, (decay, *saved), g))
