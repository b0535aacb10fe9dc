"""Normalisation in plain JAX, with a derivative of its own.

Axis letters: B batch, H and W height and width, C channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float

# What is added to a variance before its root is taken.
EPSILON = 1e-5


def normalize(
  x: Float[Array, "B H W C"],
  scale: Float[Array, "C"],
  bias: Float[Array, "C"],
  axes: tuple[int, ...],
) -> tuple[Float[Array, "B H W C"], Float[Array, "..."], Float[Array, "..."]]:
  """Normalises to mean 0 and variance 1 over these axes, then scales.

  The custom derivative moves less memory on a GPU than JAX's. In JAX's, XLA's
  fusions recompute each mean and variance, write products in float32 for the
  sums over tokens, and take long to compile. Here a barrier separates the means
  from what uses them, which takes one pass.

  Returns:
    The result in the dtype of `scale`, and mean and biased variance without
    these axes. The cotangents of mean and variance are ignored.
  """
  return _normalize(x, scale, bias, axes)


def _normalized(x, scale, bias, axes, *, in_one_pass):
  y = x.astype(scale.dtype)
  mean = jnp.mean(y, axes)
  centred = y - jnp.expand_dims(mean, axes)
  if in_one_pass:
    var = jnp.maximum(jnp.mean(jnp.square(y), axes) - jnp.square(mean), 0)
  else:
    var = jnp.mean(jnp.square(centred), axes)
  rstd = jax.lax.rsqrt(var + EPSILON)
  scale, bias = with_rank_of(y, scale), with_rank_of(y, bias)
  y = centred * (jnp.expand_dims(rstd, axes) * scale) + bias
  return (y, mean, var), rstd


def _result(x, scale, bias, axes):
  return _normalized(x, scale, bias, axes, in_one_pass=False)[0]


def _forward(x, scale, bias, axes):
  # For saved statistics XLA needs a pass over x each, but one pass for both if
  # neither depends on the other. In half precision, cancellation in the
  # variance is less than the rounding error of x.
  in_one_pass = jnp.finfo(x.dtype).bits < 32
  results, rstd = _normalized(x, scale, bias, axes, in_one_pass=in_one_pass)
  return results, (x, scale, results[1], rstd)


def _backward(axes, residuals, cotangents):
  x, scale, *statistics = residuals
  g, *_ = cotangents
  mean, rstd = (
    jnp.expand_dims(statistic, axes)
    for statistic in jax.lax.optimization_barrier(statistics)
  )
  normalized = (x.astype(g.dtype) - mean) * rstd
  scaled = g * with_rank_of(g, scale)
  dscale, dbias = (jnp.sum(x, (0, 1, 2)) for x in (g * normalized, g))
  if axes == (0, 1, 2):
    # Batch normalisation: the means are these sums, scaled.
    share = scale / math.prod(x.shape[:3])
    means = dbias * share, dscale * share
  else:
    means = jnp.mean(scaled, axes), jnp.mean(scaled * normalized, axes)
  across, along = (
    jnp.expand_dims(mean, axes) for mean in jax.lax.optimization_barrier(means)
  )
  dx = rstd * (scaled - across - normalized * along)
  return dx.astype(x.dtype), dscale, dbias


_normalize: Any = jax.custom_vjp(_result, nondiff_argnums=(3,))
_normalize.defvjp(_forward, _backward)
