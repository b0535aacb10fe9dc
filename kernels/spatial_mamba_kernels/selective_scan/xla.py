"""The selective scan in plain JAX, for every platform XLA compiles for.

States are [B, L, N, D] here, so that the channels, which are many, lie along
the vector lanes.
"""

import math

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

# Least and most tokens that a CPU sums in one product. A longer sum that has no
# divisor in this range is not cut.
_SHORTEST_SUM, _LONGEST_SUM = 64, 4096


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
  decay, drive = discretise(u, delta, A, B, delta_bias)
  first = None if h0 is None else h0.mT.astype(drive.dtype)
  return linear_recurrence(decay, drive, first, implementation)


def discretise(
  u: Array, delta: Array, A: Array, B: Array, delta_bias: Array
) -> tuple[Float[Array, "B L N D"], Float[Array, "B L N D"]]:
  """Returns each token's decay, and the input that it adds to the state."""
  dtype = state_dtype(u, delta, A, B)
  u, delta, A, B, bias = (x.astype(dtype) for x in (u, delta, A, B, delta_bias))
  # In a `shard_map`, parameters must vary as the tokens do: JAX then sums their
  # cotangents, which a derivative of our own would not.
  zero = jnp.zeros_like(u, shape=bias.shape)
  A, B, bias = A + zero[:, None], B + jnp.zeros_like(u[..., :1]), bias + zero
  return _decay_and_drive(u, delta, A, B, bias)


@jax.custom_vjp
def _decay_and_drive(u, delta, A, B, bias):
  dt = softplus(delta + with_rank_of(delta, bias))
  return _decay(dt, A), _outer(dt * u, B)


def _decay(dt, A):
  dt = dt[:, :, None]
  return jnp.exp(dt * with_rank_of(dt, A.T))


def _decay_and_drive_fwd(*arrays):
  return _decay_and_drive(*arrays), arrays


def _decay_and_drive_bwd(arrays, cotangents):
  u, delta, A, B, bias = arrays
  ddecay, ddrive = cotangents
  raw = delta + with_rank_of(delta, bias)
  dt = softplus(raw)
  dlog_decay = ddecay * _decay(dt, A)
  dinput = jnp.sum(ddrive * B[..., None], axis=2)
  rates = with_rank_of(dlog_decay, A.T)
  ddt = jnp.sum(dlog_decay * rates, axis=2) + dinput * u
  ddelta = ddt * jax.nn.sigmoid(raw)
  return (
    dinput * dt,
    ddelta,
    _sum_of_tokens(dlog_decay * dt[:, :, None]).T,
    _sum_of_channels(ddrive * (dt * u)[:, :, None]),
    _sum_of_tokens(ddelta),
  )


_decay_and_drive.defvjp(_decay_and_drive_fwd, _decay_and_drive_bwd)


def _sum_of_tokens(x: Float[Array, "B L *C"]) -> Float[Array, "*C"]:
  """Sums over images and tokens."""

  def product(x):
    batch, length, *rest = x.shape
    rows = x.reshape(batch, length, -1)
    block = _tokens_of_a_product(length)
    if block != length:
      rows = rows.reshape(batch, length // block, block, -1)
    ones = jnp.ones_like(rows[..., :1]).mT
    sums = jnp.matmul(ones, rows, precision="highest")
    return jnp.sum(sums, axis=range(rows.ndim - 1)).reshape(rest)

  # On a CPU XLA would recompute the summands, one at a time.
  return jax.lax.platform_dependent(
    x, cpu=product, default=lambda x: jnp.sum(x, axis=(0, 1))
  )


def _tokens_of_a_product(length: int) -> int:
  """Returns how many tokens one product sums.

  Long sums are cut, because a sum of partial sums rounds less.
  """
  # A symbolic size is no int.
  if not isinstance(length, int) or length <= _LONGEST_SUM:
    return length
  block = math.gcd(length, _LONGEST_SUM)
  return block if block >= _SHORTEST_SUM else length


def _sum_of_channels(x: Float[Array, "*B D"]) -> Float[Array, "*B"]:
  """Sums over the last axis."""

  def product(x):
    ones = jnp.ones(x.shape[-1], x.dtype)
    return jnp.matmul(x, ones, precision="highest")

  return jax.lax.platform_dependent(
    x, cpu=product, default=lambda x: jnp.sum(x, axis=-1)
  )


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
  (decay, drive), pullback = jax.vjp(discretise, *arguments)
  residuals = decay, h0.mT.astype(drive.dtype), *saved
  ddecay, ddrive, dfirst = recurrence_backward(None, residuals, g)
  assert dfirst is not None
  return *pullback((ddecay, ddrive)), dfirst.mT.astype(h0.dtype)
