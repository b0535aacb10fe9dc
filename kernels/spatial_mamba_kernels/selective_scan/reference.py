"""The selective scan written as its equations, the tests' reference."""

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.typing import Array


def selective_scan(
  u: Array,
  delta: Array,
  A: Array,
  B: Array,
  *,
  delta_bias: Array | float = 0.0,
  h0: Array | float = 0.0,
) -> Array:
  """See `spatial_mamba_kernels.selective_scan`; differentiated by JAX."""

  def step(h, token):
    u_t, dt_t, B_t = token
    decay = jnp.exp(dt_t[..., None] * A[None])
    h = decay * h + (dt_t * u_t)[..., None] * B_t[:, None, :]
    return h, h

  bias = jnp.broadcast_to(jnp.asarray(delta_bias, delta.dtype), delta.shape)
  dt = jax.nn.softplus(delta + bias)
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (u, dt, B))
  zeros = jnp.zeros((u.shape[0], *A.shape), jnp.result_type(u, A))
  _, h = jax.lax.scan(step, zeros + h0, tokens)
  return jnp.moveaxis(h, 0, 1)
