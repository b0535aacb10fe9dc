"""Spatial-Mamba (arXiv 2410.15091): the classifier and the backbone.

It computes the same values as the authors' PyTorch model
(`classification/models` of github.com/EdwardChasel/Spatial-Mamba).

Axis letters: B batch, H and W height and width, C channels, K classes.
"""

from collections.abc import Hashable

import jax
from flax import nnx
from spatial_mamba_kernels.activations import relu
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.backbone import Backbone, Classifier
from spatial_mamba_jax.models.config import Family, ModelConfig
from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  Mlp,
  conv3x3,
  uniform_linear,
)
from spatial_mamba_jax.models.norms import ConvNorm, LayerNorm


class Stem(nnx.Module):
  """Maps images to tokens of 4 x 4 pixels, by overlapping convolutions."""

  def __init__(self, dim: int, *, config: ModelConfig, rngs: nnx.Rngs):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    half, wide = dim // 2, 4 * dim

    def conv_norm(features_in, features_out, stride):
      conv = conv3x3(features_in, features_out, stride=stride, **kwargs)
      return ConvNorm(conv, features_out, **kwargs)

    self.conv1 = conv_norm(config.in_channels, half, 2)
    self.conv2 = nnx.List([conv_norm(half, half, 1), conv_norm(half, half, 1)])
    project = uniform_linear(wide, dim, use_bias=False, **kwargs)
    self.conv3 = nnx.List(
      [
        conv_norm(half, wide, 2),
        ConvNorm(project, dim, **kwargs),
      ]
    )

  def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Ho Wo C"]:
    x = jax.nn.relu(self.conv1(x))
    x = x + self.conv2[1](jax.nn.relu(self.conv2[0](x)))
    return self.conv3[1](jax.nn.relu(self.conv3[0](x)))


class DownSampling(nnx.Module):
  """Halves height and width, by a depthwise convolution on 4 dim_out channels.

  Linear layers before and after it change the number of channels.
  """

  def __init__(
    self, dim: int, dim_out: int, *, config: ModelConfig, rngs: nnx.Rngs
  ):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    wide = 4 * dim_out
    self.expand = uniform_linear(dim, wide, **kwargs)
    self.conv = DepthwiseConv(
      wide, stride=2, implementation=config.layer_implementation, **kwargs
    )
    self.project = ConvNorm(
      uniform_linear(wide, dim_out, **kwargs), dim_out, **kwargs
    )

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo Co"]:
    # The operator of the convolution adds the bias, to read x once for the
    # cotangents of both.
    expand = self.expand
    assert expand.bias is not None
    x = x @ expand.kernel.astype(x.dtype)
    return self.project(relu(self.conv.after_relu(x, expand.bias[...])))


class Block(nnx.Module):
  """Mixer and MLP, each behind a depthwise convolution and a LayerNorm."""

  def __init__(
    self, dim: int, variant: Hashable, *, config: ModelConfig, rngs: nnx.Rngs
  ):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    kwargs["implementation"] = config.layer_implementation
    self.conv1 = DepthwiseConv(dim, **kwargs)
    self.norm1 = LayerNorm(dim, **kwargs)
    self.mixer = config.mixer.create(dim, variant, config=config, rngs=rngs)
    self.conv2 = DepthwiseConv(dim, **kwargs)
    self.norm2 = LayerNorm(dim, **kwargs)
    self.mlp = Mlp(dim, int(config.mlp_ratio * dim), **kwargs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the block's output; see `stage.Block`."""
    first, second = (None, None) if scales is None else scales
    x, branch = self.norm1.residual(self.conv1.residual(x))
    x = x + self.mixer(branch, first)
    x, branch = self.norm2.residual(self.conv2.residual(x))
    return self.mlp(branch, x, second)

  def mixer_input(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the input of the mixer in `self(x)`."""
    return self.norm1(self.conv1.residual(x))


class SpatialMamba(Classifier):
  """The image classifier.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """


class SpatialMambaBackbone(Backbone):
  """Feature maps for detection, segmentation and other dense tasks.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """


SPATIAL_MAMBA = Family(
  "spatial_mamba",
  Stem,
  Block,
  DownSampling,
  classifier=SpatialMamba,
  backbone=SpatialMambaBackbone,
)
