"""Batch and layer normalisation: one function, over other axes.

Axis letters: B batch, H and W height and width, C channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.typing import Array, Float

_EPSILON = 1e-5


class BatchNorm(nnx.Module):
  """Batch normalisation with PyTorch's running statistics.

  `flax.nnx.BatchNorm` keeps the biased variance; PyTorch, whose checkpoints
  are to be read and written, the unbiased one. Under `jit` with a sharded
  batch, statistics are those of the whole batch.
  """

  def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    del rngs  # Nothing here is random.
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    self.scale = nnx.Param(jnp.ones(features, param_dtype))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype))
    self.mean = nnx.BatchStat(jnp.zeros(features, param_dtype))
    self.var = nnx.BatchStat(jnp.ones(features, param_dtype))
    # Unused but by PyTorch, which finds its own count again.
    self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.momentum = 0.9
    self.use_running_average = True

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    if self.use_running_average:
      scale, bias = self.affine()
      y = x * scale + bias
    else:
      y, mean, var = normalize(
        x, self.scale[...], self.bias[...], axes=(0, 1, 2)
      )
      self._update(mean, var, count=math.prod(x.shape[:-1]))
    return y.astype(x.dtype)

  def affine(self) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """(scale, bias) of a normalisation by the running statistics."""
    scale = self.scale * jax.lax.rsqrt(self.var + _EPSILON)
    return scale, self.bias - self.mean * scale

  def _update(self, mean, var, count):
    unbiased = var * (count / max(count - 1, 1))
    self.mean[...] = self._average(self.mean[...], mean)
    self.var[...] = self._average(self.var[...], unbiased)
    self.num_batches[...] += 1

  def _average(self, running, new):
    new = jax.lax.stop_gradient(new)
    return self.momentum * running + (1 - self.momentum) * new


class LayerNorm(nnx.Module):
  """Layer normalisation of each token; the result has the dtype given."""

  def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    del rngs  # Nothing here is random.
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    self.scale = nnx.Param(jnp.ones(features, param_dtype))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype))
    self.dtype = dtype

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    y, _, _ = normalize(x, self.scale[...], self.bias[...], axes=(3,))
    return y.astype(self.dtype)


def normalize(
  x: Float[Array, "B H W C"],
  scale: Float[Array, "C"],
  bias: Float[Array, "C"],
  axes: tuple[int, ...],
) -> tuple[Float[Array, "B H W C"], Float[Array, "..."], Float[Array, "..."]]:
  """Normalises to mean 0 and variance 1 over these axes, then scales.

  Its derivative moves less memory on a GPU than the one that JAX finds. Of that
  XLA makes fusions that find each mean and variance anew and leave products in
  float32 behind, for sums over tokens to read; and it searches long for them.
  Here means are behind a barrier: all that is made from them takes one pass.

  Returns:
    The result in the dtype of `scale`, and mean and biased variance without
    these axes. Nothing is propagated back through mean and variance.
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
  rstd = jax.lax.rsqrt(var + _EPSILON)
  y = centred * (jnp.expand_dims(rstd, axes) * scale) + bias
  return (y, mean, var), rstd


def _result(x, scale, bias, axes):
  return _normalized(x, scale, bias, axes, in_one_pass=False)[0]


def _forward(x, scale, bias, axes):
  # XLA makes a pass over x of each statistic that is kept for a derivative, but
  # one of both where neither needs the other. In half precision what cancels in
  # the variance is less than what the rounding of x has changed.
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
  scaled = g * scale
  means = jnp.mean(scaled, axes), jnp.mean(scaled * normalized, axes)
  across, along = (
    jnp.expand_dims(mean, axes) for mean in jax.lax.optimization_barrier(means)
  )
  dx = rstd * (scaled - across - normalized * along)
  return (
    dx.astype(x.dtype),
    jnp.sum(g * normalized, (0, 1, 2)),
    jnp.sum(g, (0, 1, 2)),
  )


_normalize: Any = jax.custom_vjp(_result, nondiff_argnums=(3,))
_normalize.defvjp(_forward, _backward)
