"""The selective SSM in plain JAX, for every platform XLA compiles for."""

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from spatial_mamba_kernels.observation import observe
from spatial_mamba_kernels.selective_scan import states as scan
from spatial_mamba_kernels.shapes import state_dtype
from spatial_mamba_kernels.typing import Array, Float

# Tokens whose states are in memory at once.
CHUNK = 128


def selective_ssm(
  u: Float[Array, "B L D"],
  delta: Float[Array, "B L D"],
  A: Float[Array, "D N"],
  B: Float[Array, "B L N"],
  C: Float[Array, "B L N"],
  D: Float[Array, " D"],
  delta_bias: Float[Array, " D"],
  *,
  implementation: str | None,
) -> Float[Array, "B L D"]:
  """Scans chunk by chunk; the backward pass recomputes the states of each."""

  def chunk(first, tokens):
    u, delta, B, C = tokens
    h = scan(u, delta, A, B, delta_bias, first, implementation=implementation)
    return h[:, -1].mT, observe(C, h, D, u)

  tokens = u, delta, B, C
  batch, length, _ = u.shape
  if is_symbolic_dim(length) or length <= CHUNK:
    return chunk(None, tokens)[1]
  whole = length - length % CHUNK
  chunks = jax.tree.map(lambda x: _chunks(x[:, :whole]), tokens)
  zeros = jnp.zeros_like(u[:, 0], state_dtype(u, delta, A, B))
  first = jnp.broadcast_to(zeros[..., None], (*zeros.shape, A.shape[1]))
  chunk = jax.checkpoint(chunk)
  last, y = jax.lax.scan(chunk, first, chunks)
  y = jnp.moveaxis(y, 0, 1).reshape(batch, whole, -1)
  if whole < length:
    _, rest = chunk(last, tuple(x[:, whole:] for x in tokens))
    y = jnp.concatenate((y, rest), axis=1)
  return y


def _chunks(x: Float[Array, "B L C"]) -> Float[Array, "K B T C"]:
  batch, length, channels = x.shape
  x = x.reshape(batch, length // CHUNK, CHUNK, channels)
  return jnp.moveaxis(x, 1, 0)
