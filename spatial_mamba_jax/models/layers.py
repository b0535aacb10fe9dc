"""The layers that Flax does not have, or has with other numbers than PyTorch.

Axis letters: B batch, H and W height and width, C channels.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.by_platform import keep
from spatial_mamba_kernels.typing import Array, Float

_EPSILON = 1e-5

# The authors truncate theirs at +-2 absolute, a hundred deviations away.
_normal = nnx.initializers.normal(0.02)


def uniform_fan_in(fan_in: int) -> nnx.Initializer:
  """Uniform in +-1/sqrt(fan_in): how PyTorch starts convolutions and Linear.

  It is Kaiming's uniform with a = sqrt(5) for kernels, and the default for
  biases.
  """
  bound = 1 / math.sqrt(fan_in)

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


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
      mean, var = self.mean[...], self.var[...]
    else:
      mean, var = self._update(x)
    scale, bias = self.affine(mean, var)
    return (x * scale + bias).astype(x.dtype)

  def affine(
    self, mean: Float[Array, "C"], var: Float[Array, "C"]
  ) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """(scale, bias) of a normalisation by these statistics."""
    scale = self.scale * jax.lax.rsqrt(var + _EPSILON)
    return scale, self.bias - mean * scale

  def _update(self, x):
    axes = tuple(range(x.ndim - 1))
    count = math.prod(x.shape[:-1])
    x = x.astype(self.mean.dtype)
    mean = jnp.mean(x, axes)
    var = jnp.mean(jnp.square(x - mean), axes)
    unbiased = var * (count / max(count - 1, 1))
    self.mean[...] = self._average(self.mean[...], mean)
    self.var[...] = self._average(self.var[...], unbiased)
    self.num_batches[...] += 1
    return mean, var

  def _average(self, running, new):
    new = jax.lax.stop_gradient(new)
    return self.momentum * running + (1 - self.momentum) * new


class LayerNorm(nnx.Module):
  """Layer normalisation of each token's channels; the result has `dtype`."""

  def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    del rngs  # Nothing here is random.
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    self.scale = nnx.Param(jnp.ones(features, param_dtype))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype))
    self.dtype = dtype

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    y = _layer_norm(x, self.scale[...], self.bias[...])
    return y.astype(self.dtype)


@jax.custom_vjp
def _layer_norm(x, scale, bias):
  """Normalises, with a derivative that moves less memory on a GPU.

  Of the one that JAX finds, XLA makes fusions that find every token's mean and
  variance anew and leave products in float32 behind, for sums over tokens to
  read; and it searches long for them. Here means over channels are behind a
  barrier, and all that is made from them takes one pass.
  """
  return _layer_norm_fwd(x, scale, bias)[0]


def _layer_norm_fwd(x, scale, bias):
  y = x.astype(scale.dtype)
  mean = jnp.mean(y, -1)
  y -= mean[..., None]
  rstd = jax.lax.rsqrt(jnp.mean(jnp.square(y), -1) + _EPSILON)
  y *= rstd[..., None] * scale
  return y + bias, (x, scale, mean, rstd)


def _layer_norm_bwd(residuals, g):
  x, scale, mean, rstd = residuals
  mean, rstd = jax.lax.optimization_barrier((mean, rstd))
  normalized = (x.astype(g.dtype) - mean[..., None]) * rstd[..., None]
  scaled = g * scale
  across, along = jax.lax.optimization_barrier(
    (jnp.mean(scaled, -1), jnp.mean(scaled * normalized, -1))
  )
  dx = scaled - across[..., None] - normalized * along[..., None]
  tokens = tuple(range(x.ndim - 1))
  return (
    (dx * rstd[..., None]).astype(x.dtype),
    jnp.sum(g * normalized, tokens),
    jnp.sum(g, tokens),
  )


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


class DepthwiseConv(nnx.Module):
  """Depthwise 3x3 convolution with a bias, zero padding."""

  def __init__(
    self,
    features: int,
    *,
    stride: int = 1,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    init = uniform_fan_in(9)
    self.kernel = nnx.Param(init(rngs.params(), (3, 3, features), param_dtype))
    self.bias = nnx.Param(init(rngs.params(), (features,), param_dtype))
    self.stride = stride

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo C"]:
    y = smk.depthwise_conv(x, self.kernel[...], stride=self.stride)
    return y + self.bias.astype(y.dtype)


class Mlp(nnx.Module):
  """Linear, exact GELU, Linear."""

  def __init__(
    self, features: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs
  ):
    self.fc1 = linear(features, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, features, dtype=dtype, rngs=rngs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    return self.fc2(gelu(keep(self.fc1(x))))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """The exact GELU; `jax.nn.gelu`'s erfc costs twice as much on a CPU."""
  return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """X * sigmoid(x), as one division.

  XLA takes a division for expensive and computes it once. The product of
  `jax.nn.silu` it computes again in each consumer, the depthwise convolution
  before it included; on a CPU that made the state fusion 12 times slower.
  """
  return x / (1 + jnp.exp(-x))


@silu.defjvp
def _silu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  gate = jax.nn.sigmoid(x)
  return silu(x), dx * gate * (1 + x * (1 - gate))


def linear(
  features_in: int,
  features_out: int,
  *,
  use_bias: bool = True,
  kernel_init: nnx.Initializer = _normal,
  bias_init: nnx.Initializer = nnx.initializers.zeros,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """A linear layer that starts as most of the authors' do."""
  return nnx.Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init,
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
    rngs=rngs,
  )


def uniform_linear(
  features_in: int, features_out: int, **kwargs: Any
) -> nnx.Linear:
  """A linear layer or 1x1 convolution that starts as PyTorch starts both."""
  init = uniform_fan_in(features_in)
  return linear(
    features_in, features_out, kernel_init=init, bias_init=init, **kwargs
  )


def conv3x3(
  features_in: int,
  features_out: int,
  *,
  stride: int,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """A full 3x3 convolution without bias, zero padding."""
  return nnx.Conv(
    features_in,
    features_out,
    (3, 3),
    strides=stride,
    padding=1,
    use_bias=False,
    kernel_init=uniform_fan_in(9 * features_in),
    dtype=dtype,
    param_dtype=jnp.promote_types(dtype, jnp.float32),
    rngs=rngs,
  )


def drop_path_scales(
  key: Array, rates: Sequence[float], batch: int
) -> Float[Array, "depth 2 B"]:
  """Draws which residual branches are dropped (stochastic depth).

  All at once, because draws in each block, and again in its backward pass,
  would be much of what there is to compile in a training step.

  Args:
    key: random key.
    rates: of each block, the share of samples of which it drops a branch.
    batch: samples.

  Returns:
    What to multiply each sample of a block's two branches by: 0, or what makes
    up for the dropped ones.
  """
  keep = 1 - jnp.asarray(rates, float)[:, None, None]
  kept = jax.random.bernoulli(key, keep, (len(rates), 2, batch))
  return jnp.where(kept, 1 / keep, 0)


def drop_path(
  x: Float[Array, "B ..."], scale: Float[Array, "B"]
) -> Float[Array, "B ..."]:
  """A residual branch, by the scale that `drop_path_scales` drew of it."""
  return x * scale.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
