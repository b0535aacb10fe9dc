"""Batch and layer normalisation.

Axis letters: B batch, H and W height and width, C channels.
"""

import math

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.normalization import EPSILON, normalize
from spatial_mamba_kernels.shapes import at_least_float32, with_rank_of
from spatial_mamba_kernels.typing import Array, Float


class BatchNorm(nnx.Module):
  """Batch normalisation with PyTorch's running statistics.

  The running variance is unbiased, as in PyTorch's checkpoints;
  `flax.nnx.BatchNorm` has the biased variance. Under `jit` with a sharded
  batch, statistics are over the whole batch.
  """

  def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    del rngs  # Nothing here is random.
    param_dtype = at_least_float32(dtype)
    self.scale = nnx.Param(jnp.ones(features, param_dtype))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype))
    self.mean = nnx.BatchStat(jnp.zeros(features, param_dtype))
    self.var = nnx.BatchStat(jnp.ones(features, param_dtype))
    # PyTorch's `num_batches_tracked`, only for conversion.
    self.num_batches = nnx.BatchStat(jnp.zeros((), jnp.int32))
    self.momentum = 0.9
    self.use_running_average = True

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    if self.use_running_average:
      scale, bias = self.affine()
      y = x.astype(scale.dtype) * with_rank_of(x, scale) + with_rank_of(x, bias)
    else:
      y, mean, var = normalize(
        x, self.scale[...], self.bias[...], axes=(0, 1, 2)
      )
      self._update(mean, var, count=math.prod(x.shape[:-1]))
    return y.astype(x.dtype)

  def affine(self) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Returns (scale, bias) such that eval mode computes x * scale + bias."""
    scale = self.scale * jax.lax.rsqrt(self.var + EPSILON)
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
  """Layer normalisation of each token.

  Calling it returns the layer's dtype; `residual` and `gated` return x's dtype.
  """

  def __init__(
    self,
    features: int,
    *,
    implementation: str | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    del rngs  # Nothing here is random.
    param_dtype = at_least_float32(dtype)
    self.scale = nnx.Param(jnp.ones(features, param_dtype))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype))
    self.dtype = dtype
    self.implementation = implementation

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    y, _, _ = normalize(x, self.scale[...], self.bias[...], axes=(3,))
    return y.astype(self.dtype)

  def residual(
    self, x: Float[Array, "B H W C"]
  ) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """Returns `x` for the skip connection, and norm(x) for the branch."""
    return smk.residual_layer_norm(
      x, self.scale[...], self.bias[...], implementation=self.implementation
    )

  def gated(
    self,
    x: Float[Array, "B H W C"],
    gate: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Returns norm(x) * silu(gate) * branch_scale; see `drop_path_scales`."""
    return smk.gated_layer_norm(
      x,
      self.scale[...],
      self.bias[...],
      gate,
      branch_scale,
      implementation=self.implementation,
    )
