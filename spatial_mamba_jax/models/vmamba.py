"""VMamba (arXiv 2401.10166): the classifier and the backbone.

It computes the same values as the authors' newest PyTorch models, the configs
`vmambav2v_*` of github.com/MzeroMiko/VMamba, commit 2ed52ea.

Axis letters: B batch, H and W height and width, C channels, I image channels.
"""

from collections.abc import Hashable

import jax
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.backbone import Backbone, Classifier
from spatial_mamba_jax.models.config import Family, ModelConfig
from spatial_mamba_jax.models.layers import Mlp, conv3x3
from spatial_mamba_jax.models.norms import LayerNorm


class Stem(nnx.Module):
  """Maps images to tokens of 4 x 4 pixels, by overlapping convolutions."""

  def __init__(self, dim: int, *, config: ModelConfig, rngs: nnx.Rngs):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    conv = {"stride": 2, "use_bias": True, **kwargs}
    self.conv1 = conv3x3(config.in_channels, dim // 2, **conv)
    self.norm1 = LayerNorm(dim // 2, **kwargs)
    self.conv2 = conv3x3(dim // 2, dim, **conv)
    self.norm2 = LayerNorm(dim, **kwargs)

  def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Ho Wo C"]:
    x = jax.nn.gelu(self.norm1(self.conv1(x)), approximate=False)
    return self.norm2(self.conv2(x))


class DownSampling(nnx.Module):
  """Halves height and width by a convolution, and normalises."""

  def __init__(
    self, dim: int, dim_out: int, *, config: ModelConfig, rngs: nnx.Rngs
  ):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    self.conv = conv3x3(dim, dim_out, stride=2, use_bias=True, **kwargs)
    self.norm = LayerNorm(dim_out, **kwargs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo Co"]:
    return self.norm(self.conv(x))


class Block(nnx.Module):
  """Mixer and MLP, each behind a LayerNorm."""

  def __init__(
    self, dim: int, variant: Hashable, *, config: ModelConfig, rngs: nnx.Rngs
  ):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    kwargs["implementation"] = config.layer_implementation
    self.norm1 = LayerNorm(dim, **kwargs)
    self.mixer = config.mixer.create(dim, variant, config=config, rngs=rngs)
    self.norm2 = LayerNorm(dim, **kwargs)
    self.mlp = Mlp(dim, int(config.mlp_ratio * dim), **kwargs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the block's output; see `stage.Block`."""
    first, second = (None, None) if scales is None else scales
    x, branch = self.norm1.residual(x)
    x, branch = self.norm2.residual(x + self.mixer(branch, first))
    return self.mlp(branch, x, second)

  def mixer_input(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the input of the mixer in `self(x)`."""
    return self.norm1(x)


class VMamba(Classifier):
  """The image classifier.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """


class VMambaBackbone(Backbone):
  """Feature maps for detection, segmentation and other dense tasks.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """


VMAMBA = Family(
  "vmamba",
  Stem,
  Block,
  DownSampling,
  classifier=VMamba,
  backbone=VMambaBackbone,
)
