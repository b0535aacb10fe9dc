"""Batch and layer normalisation.

Axis letters: B batch, H and W height and width, C channels.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.normalization import EPSILON, normalize
from spatial_mamba_kernels.shapes import at_least_float32, with_rank_of
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.initializers import constant


class BatchNorm(nnx.Module):
  """Batch normalisation with PyTorch's running statistics.

  The running variance is unbiased, as in PyTorch's checkpoints;
  `flax.nnx.BatchNorm` has the biased variance. Under `jit` with a sharded
  batch, statistics are over the whole batch.

  Attributes:
    group: number of consecutive images that share statistics in training, as
      the images on one device do in PyTorch; None for the whole batch. The
      running statistics are means over the groups.
  """

  def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
    del rngs  # Nothing here is random.
    param_dtype = at_least_float32(dtype)
    self.scale = nnx.Param(constant(1, features, param_dtype))
    self.bias = nnx.Param(constant(0, features, param_dtype))
    self.mean = nnx.BatchStat(constant(0, features, param_dtype))
    self.var = nnx.BatchStat(constant(1, features, param_dtype))
    # PyTorch's `num_batches_tracked`, only for conversion.
    self.num_batches = nnx.BatchStat(constant(0, (), jnp.int32))
    self.momentum = 0.9
    self.use_running_average = True
    self.group: int | None = None

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    if self.use_running_average:
      scale, bias = self.affine()
      y = x.astype(scale.dtype) * with_rank_of(x, scale) + with_rank_of(x, bias)
    elif self.group is None:
      y, mean, var = self._normalize(x)
      self._update(mean, var, count=math.prod(x.shape[:-1]))
    else:
      groups = _grouped(x, self.group)
      y, means, variances = jax.vmap(self._normalize)(groups)
      mean, var = jnp.mean(means, 0), jnp.mean(variances, 0)
      self._update(mean, var, count=math.prod(groups.shape[1:-1]))
      y = y.reshape(x.shape)
    return y.astype(x.dtype)

  def _normalize(self, x):
    return normalize(x, self.scale[...], self.bias[...], axes=(0, 1, 2))

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


def _grouped(x: Array, group: int) -> Float[Array, "G N H W C"]:
  if len(x) % group:
    raise UserError(
      f"{len(x)} images of a batch cannot share BatchNorm's statistics in"
      f" groups of {group}: change the batch size, or the size of a group"
    )
  return x.reshape(-1, group, *x.shape[1:])


class ConvNorm(nnx.Module):
  """A convolution or linear layer, and batch normalisation.

  In eval mode the normalisation is folded into the weights, so that a GPU's
  convolution can add the bias and apply ReLU before it writes its result.
  """

  def __init__(self, conv: nnx.Conv | nnx.Linear, features: int, **kwargs):
    self.conv = conv
    self.norm = BatchNorm(features, **kwargs)

  def __call__(
    self, *parts: Float[Array, "B H W _"]
  ) -> Float[Array, "B Ho Wo Co"]:
    """Applies both to the concatenation of some maps along the channels.

    Several maps are convolved one by one and added, so that their concatenation
    is never in memory.
    """
    if not self.norm.use_running_average:
      return self.norm(_conv_of(self.conv, parts))
    scale, bias = self.norm.affine()
    conv = nnx.clone(self.conv)
    conv.kernel[...] *= with_rank_of(conv.kernel[...], scale)
    if conv.bias is not None:
      conv.bias[...] = conv.bias * scale + bias
      return _conv_of(conv, parts)
    y = _conv_of(conv, parts)
    return y + with_rank_of(y, bias.astype(y.dtype))


def _conv_of(conv: nnx.Conv | nnx.Linear, parts: Sequence[Array]) -> Array:
  if len(parts) == 1:
    return conv(parts[0])
  assert conv.bias is None
  *ends, _ = itertools.accumulate(x.shape[-1] for x in parts)
  kernels = jnp.split(conv.kernel[...], ends, axis=-2)
  products = map(_conv_by, itertools.repeat(conv), kernels, parts)
  return functools.reduce(jnp.add, products)


def _conv_by(conv: nnx.Conv | nnx.Linear, kernel: Array, x: Array) -> Array:
  conv = nnx.clone(conv)
  conv.kernel = nnx.Param(kernel)
  return conv(x)


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
    self.scale = nnx.Param(constant(1, features, param_dtype))
    self.bias = nnx.Param(constant(0, features, param_dtype))
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
