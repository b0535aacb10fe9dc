"""Activation functions in the forms that XLA compiles best."""

import math

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.typing import Array, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Computes the exact GELU, in half of `jax.nn.gelu`'s time on a CPU."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def softplus(x: Array) -> Array:
  """log(1 + exp(x)), half the cost of `jax.nn.softplus` on a CPU."""
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  # The derivatives of maximum and abs at 0 would give 0 there, not 1/2.
  return softplus(x), dx * jax.nn.sigmoid(x)


@jax.custom_jvp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Computes x * sigmoid(x), as one division.

  XLA considers a division expensive, and computes it once. It recomputes the
  product of `jax.nn.silu` in each consumer, together with the depthwise
  convolution before it. On a CPU this made the state fusion 12 times slower.
  """
  return x / (1 + jnp.exp(-x))


@silu.defjvp
def _silu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  gate = jax.nn.sigmoid(x)
  return silu(x), dx * gate * (1 + x * (1 - gate))


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Computes max(x, 0); the derivative saves the result instead of x.

  `jax.nn.relu` saves x: if a kernel also reads the result, both are written to
  memory. After a normalisation `jax.nn.relu` is better, because its derivative
  recomputes x from what the normalisation's derivative reads.
  """
  return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  # Without the barrier XLA would replace y > 0 by x > 0, which needs x.
  y = jax.lax.optimization_barrier(relu(x))
  return y, jnp.where(y > 0, dx, 0)
