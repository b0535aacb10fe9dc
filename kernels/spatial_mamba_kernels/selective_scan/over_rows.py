"""The selective scan of images whose rows a mesh axis splits over devices.

Each device reduces its tokens to two numbers a state: what they add to a state
of zero, and by how much they decay a state from before. One all-gather
exchanges them. Every device then knows the state before its first token, and
scans its tokens from there.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.activations import softplus
from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.recurrence import recur, shift
from spatial_mamba_kernels.shapes import state_dtype, with_rank_of
from spatial_mamba_kernels.sharding import (
  BATCH,
  CHANNELS,
  ROWS,
  ROWS_AXIS,
  WHOLE,
  check_divides_rows,
  per_shard,
  split_axes,
)
from spatial_mamba_kernels.typing import Array, Float

_TOKENS = (BATCH, ROWS, CHANNELS)
_NUMBERS = (BATCH, ROWS, WHOLE)
_PARAMETERS = (CHANNELS, WHOLE), (CHANNELS,)
_STATE = (BATCH, CHANNELS, WHOLE)


def scan(
  operator: Operator, arrays: Arrays, implementation: str | None
) -> Float[Array, "B L N D"]:
  """Applies the operator `selective_scan` to tokens that are split by rows.

  Raises:
    ValueError: the tokens do not divide evenly.
    NotImplementedError: see `split_axes`.
  """
  batch, length, channels = arrays[0].shape
  check_divides_rows("selective_scan", length, 1, "tokens")
  A, bias = _PARAMETERS
  run = per_shard(
    partial(_scan_shard, operator, implementation),
    ((_TOKENS, _TOKENS, A, _NUMBERS, bias, _STATE),),
    (BATCH, ROWS, WHOLE, CHANNELS),
    split_axes(batch, channels, by_rows=True),
  )
  return run(arrays)


def _scan_shard(operator, implementation, arrays):
  *tokens, _ = arrays
  return operator((*tokens, _state_before(arrays)), implementation)


def _state_before(arrays):
  """Returns the state before this device's first token, [B, D, N]."""
  dtype = state_dtype(*arrays[:4])
  u, delta, A, B, bias, h0 = (x.astype(dtype) for x in arrays)
  added, decay = _summary(u, delta, A, B, bias)
  gathered = jax.lax.all_gather(jnp.stack([added, decay]), ROWS_AXIS, axis=2)
  added, decay = gathered  # [B, K, D, N] of K devices.
  after = recur(decay, added, h0, "associative", reverse=False)
  before = shift(after, 1, h0)
  here = jax.lax.axis_index(ROWS_AXIS)
  return jax.lax.dynamic_index_in_dim(before, here, axis=1, keepdims=False)


def _summary(
  u: Float[Array, "B L D"],
  delta: Float[Array, "B L D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B L N"],
  bias: Float[Array, " D"],
) -> tuple[Float[Array, "B D N"], Float[Array, "B D N"]]:
  """Returns what tokens add to a state of zero, and its decay over them."""
  dt = softplus(delta + with_rank_of(delta, bias))
  # From the last token, so that the time that matters, a short one, is exact.
  time = jax.lax.cumsum(dt, axis=1, reverse=True)
  drive = dt * u
  added, decay = [], []
  for n in range(A.shape[1]):
    rate = A[:, n]
    weight = jnp.exp((time - dt) * with_rank_of(dt, rate))
    added.append(jnp.sum(weight * drive * B[..., n : n + 1], axis=1))
    total = time[:, 0]
    decay.append(jnp.exp(total * with_rank_of(total, rate)))
  return jnp.stack(added, axis=-1), jnp.stack(decay, axis=-1)
