"""Layers that Flax lacks, or initialises differently from PyTorch.

Axis letters: B batch, H and W height and width, C channels.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.shapes import at_least_float32, with_rank_of
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models import initializers

# Initialiser of linear layers. The authors truncate theirs at +-2, which is 100
# standard deviations from 0.
_normal = initializers.normal(0.02)


class DepthwiseConv(nnx.Module):
  """Depthwise convolution with zero padding, 3x3 and with bias by default.

  Each method fuses a 3x3 convolution with the operations next to it.
  """

  def __init__(
    self,
    features: int,
    *,
    size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
    implementation: str | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    param_dtype = at_least_float32(dtype)
    init = initializers.fan_in_uniform(size**2)
    shape = (size, size, features)
    self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
    self.bias = (
      nnx.Param(init(rngs.params(), (features,), param_dtype))
      if use_bias
      else None
    )
    self.stride = stride
    self.implementation = implementation

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    y = smk.depthwise_conv(
      x, self.kernel[...], implementation=self.implementation
    )
    return y + with_rank_of(y, self._bias().astype(y.dtype))

  def residual(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the sum of x and conv(x)."""
    return self._unstrided(smk.residual_depthwise_conv, x)

  def silu(
    self, x: Float[Array, "B H W C"], projection: Float[Array, "C P"]
  ) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W P"]]:
    """Returns y, the SiLU of conv(x), and y @ projection."""
    return self._unstrided(smk.silu_depthwise_conv, x, projection)

  def _unstrided(self, operator, x, *others):
    assert self.stride == 1
    arrays = x, self.kernel[...], self._bias(), *others
    return operator(*arrays, implementation=self.implementation)

  def after_relu(
    self, x: Float[Array, "B H W C"], bias: Float[Array, "C"]
  ) -> Float[Array, "B Ho Wo C"]:
    """Returns conv(relu(x + bias)), for a stride of 2 or more."""
    y = smk.relu_depthwise_conv(
      x,
      bias,
      self.kernel[...],
      stride=self.stride,
      implementation=self.implementation,
    )
    return y + with_rank_of(y, self._bias().astype(y.dtype))

  def _bias(self):
    if self.bias is None:
      return jnp.zeros_like(self.kernel[0, 0])
    return self.bias[...]


class SequenceConv(nnx.Module):
  """Depthwise convolution over a sequence, with bias and zero padding."""

  def __init__(
    self,
    features: int,
    size: int,
    *,
    is_causal: bool = False,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Initialises as PyTorch's Conv1d does.

    Args:
      features: C.
      size: taps of the kernel.
      is_causal: whether the last tap is at the token itself, not the middle
        one.
      dtype: of activations.
      rngs: random streams.
    """
    param_dtype = at_least_float32(dtype)
    init = initializers.fan_in_uniform(size)
    self.kernel = nnx.Param(init(rngs.params(), (size, features), param_dtype))
    self.bias = nnx.Param(init(rngs.params(), (features,), param_dtype))
    self.is_causal = is_causal

  def __call__(self, x: Float[Array, "B L C"]) -> Float[Array, "B L C"]:
    kernel = self.kernel[...]
    if self.is_causal:
      y = smk.causal_depthwise_conv(x, kernel)
    else:
      y = smk.depthwise_conv(x[:, None], kernel[None])[:, 0]
    return y + with_rank_of(y, self.bias.astype(y.dtype))


class Mlp(nnx.Module):
  """A residual branch: Linear, exact GELU, Linear."""

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    implementation: str | None = None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.implementation = implementation
    self.fc1 = linear(features, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = linear(hidden, features, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    residual: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Returns residual + branch_scale * mlp(x); see `drop_path_scales`."""
    first, second = self.fc1, self.fc2
    assert first.bias is not None
    assert second.bias is not None
    return smk.mlp(
      x,
      first.kernel[...],
      first.bias[...],
      second.kernel[...],
      second.bias[...],
      residual=residual,
      branch_scale=branch_scale,
      implementation=self.implementation,
    )


def linear(
  features_in: int,
  features_out: int,
  *,
  use_bias: bool = True,
  kernel_init: nnx.Initializer = _normal,
  bias_init: nnx.Initializer = initializers.zeros,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """Creates a linear layer, by default initialised as most of the authors'."""
  return nnx.Linear(
    features_in,
    features_out,
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init,
    dtype=dtype,
    param_dtype=at_least_float32(dtype),
    rngs=rngs,
  )


def uniform_linear(
  features_in: int, features_out: int, **kwargs: Any
) -> nnx.Linear:
  """Creates a linear layer with PyTorch's default initialisation.

  It also stands for a 1x1 convolution.
  """
  init = initializers.fan_in_uniform(features_in)
  return linear(
    features_in, features_out, kernel_init=init, bias_init=init, **kwargs
  )


def halves(
  layer: nnx.Linear, x: Float[Array, "*B C"]
) -> list[Float[Array, "*B D"]]:
  """Returns both halves of the features of a linear layer."""
  if smk.traced_for() != "cuda":
    return jnp.split(smk.keep(layer(x)), 2, axis=-1)
  # Two products, because a kernel cannot read half of an array, so that XLA
  # would copy both halves of one product. On a CPU one product is faster.
  kernels = jnp.split(layer.kernel.astype(x.dtype), 2, axis=1)
  biases: list[Array | None] = [None, None]
  if layer.bias is not None:
    biases[:] = jnp.split(layer.bias.astype(x.dtype), 2)
  # The barrier keeps XLA from merging the two products into one.
  same = x, jax.lax.optimization_barrier(x)
  return [
    smk.keep(x @ kernel if bias is None else x @ kernel + with_rank_of(x, bias))
    for x, kernel, bias in zip(same, kernels, biases, strict=True)
  ]


def scaled(
  branch: Float[Array, "B H W C"], scale: Float[Array, "B"] | None
) -> Float[Array, "B H W C"]:
  """Returns branch * scale of each image; see `drop_path_scales`."""
  if scale is None:
    return branch
  return branch * scale.astype(branch.dtype)[:, None, None, None]


def conv3x3(
  features_in: int,
  features_out: int,
  *,
  stride: int,
  use_bias: bool = False,
  dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> nnx.Conv:
  """Creates a full 3x3 convolution with zero padding."""
  init = initializers.fan_in_uniform(9 * features_in)
  return nnx.Conv(
    features_in,
    features_out,
    (3, 3),
    strides=stride,
    padding=1,
    use_bias=use_bias,
    kernel_init=init,
    bias_init=init,
    dtype=dtype,
    param_dtype=at_least_float32(dtype),
    rngs=rngs,
  )


def drop_path_scales(
  key: Array, rates: Sequence[float], batch: int
) -> Float[Array, "depth 2 B"]:
  """Draws which residual branches are dropped (stochastic depth).

  One operation draws for all blocks. Separate draws in each block, recomputed
  in its backward pass, would take much of a training step's compile time.

  Args:
    key: random key.
    rates: for each block, the probability of dropping a branch of a sample.
    batch: number of samples.

  Returns:
    Factors of the two branches of each block, for each sample: 0 drops the
    branch, otherwise 1 / (1 - rate).
  """
  keep = 1 - jnp.asarray(rates, float)[:, None, None]
  kept = jax.random.bernoulli(key, keep, (len(rates), 2, batch))
  return jnp.where(kept, 1 / keep, 0)
