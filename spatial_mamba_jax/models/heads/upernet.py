"""UPerNet's heads (arXiv 1807.10221), as mmsegmentation 1.2.2 has them.

They are `UPerHead` and `FCNHead` of mmseg/models/decode_heads.

Axis letters: B batch, H and W height and width, C channels, K classes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.shapes import at_least_float32
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.heads.resampling import pool, resize
from spatial_mamba_jax.models.initializers import normal
from spatial_mamba_jax.models.layers import linear
from spatial_mamba_jax.models.norms import ConvNorm

# Cells along an axis of the pooled maps (pyramid pooling, arXiv 1612.01105).
POOLED_SIZES = (1, 2, 3, 6)


class ConvRelu(ConvNorm):
  """A convolution without bias, batch normalisation and ReLU."""

  def __init__(
    self,
    features_in: int,
    features_out: int,
    *,
    size: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Initialises as mmcv's ConvModule: normal by fan-out, for ReLU.

    Args:
      features_in: input channels.
      features_out: output channels.
      size: rows and columns of the kernel; a kernel of 1 is a linear layer.
      dtype: of activations.
      rngs: random streams.
    """
    std = math.sqrt(2 / (features_out * size**2))
    kwargs = {
      "use_bias": False,
      "kernel_init": normal(std),
      "dtype": dtype,
      "param_dtype": at_least_float32(dtype),
      "rngs": rngs,
    }
    features = features_in, features_out
    conv = (
      nnx.Linear(*features, **kwargs)
      if size == 1
      else nnx.Conv(*features, (size, size), padding=size // 2, **kwargs)
    )
    super().__init__(conv, features_out, dtype=dtype, rngs=rngs)

  def __call__(
    self, *parts: Float[Array, "B H W _"]
  ) -> Float[Array, "B H W Co"]:
    return jax.nn.relu(super().__call__(*parts))


class PixelClassifier(nnx.Module):
  """Dropout of whole channels, and a linear layer for each pixel."""

  def __init__(
    self,
    features: int,
    num_classes: int,
    *,
    dropout_rate: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.linear = linear(
      features,
      num_classes,
      kernel_init=normal(0.01),
      dtype=at_least_float32(dtype),
      rngs=rngs,
    )
    self.dropout_rate = dropout_rate
    self.deterministic = True

  def __call__(
    self, x: Float[Array, "B H W C"], rngs: nnx.Rngs | None
  ) -> Float[Array, "B H W K"]:
    if not self.deterministic and self.dropout_rate:
      if rngs is None:
        raise ValueError(
          "training with dropout is random: call it with"
          " rngs=nnx.Rngs(drop_path=key, dropout=key), or model.eval() first"
        )
      keep = 1 - self.dropout_rate
      shape = (len(x), 1, 1, x.shape[-1])
      kept = jax.random.bernoulli(rngs.dropout(), keep, shape)
      x = x * jnp.where(kept, 1 / keep, 0).astype(x.dtype)
    return self.linear(x)


class UPerHead(nnx.Module):
  """Pyramid pooling of the last feature map, and a feature pyramid."""

  def __init__(
    self,
    in_channels: Sequence[int],
    channels: int,
    num_classes: int,
    *,
    dropout_rate: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Creates the head.

    Args:
      in_channels: channels of the feature maps, from the largest map on.
      channels: channels of all maps of the head.
      num_classes: K.
      dropout_rate: probability of dropping a channel before the classifier.
      dtype: of activations; logits are float32, or float64.
      rngs: random streams.
    """

    def conv(features_in, size):
      return ConvRelu(features_in, channels, size=size, dtype=dtype, rngs=rngs)

    *lower, last = in_channels
    pools = len(POOLED_SIZES)
    self.psp_convs = nnx.List([conv(last, 1) for _ in POOLED_SIZES])
    self.bottleneck = conv(last + pools * channels, 3)
    self.lateral_convs = nnx.List([conv(features, 1) for features in lower])
    self.fpn_convs = nnx.List([conv(channels, 3) for _ in lower])
    self.fpn_bottleneck = conv(len(in_channels) * channels, 3)
    self.classifier = PixelClassifier(
      channels, num_classes, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs
    )

  def __call__(
    self,
    features: Sequence[Float[Array, "B _ _ _"]],
    *,
    rngs: nnx.Rngs | None = None,
  ) -> Float[Array, "B H W K"]:
    """Returns logits at the resolution of the first map.

    Args:
      features: the backbone's maps, from the largest on.
      rngs: random streams; `dropout` is needed in training mode.
    """
    return self.classifier(self.pyramid(features), rngs)

  def pyramid(
    self, features: Sequence[Float[Array, "B _ _ _"]]
  ) -> Float[Array, "B H W C"]:
    """Returns what the classifier reads."""
    *lower, last = features
    laterals = [
      conv(x) for conv, x in zip(self.lateral_convs, lower, strict=True)
    ]
    laterals.append(self.pyramid_pooling(last))
    for i in reversed(range(len(lower))):
      laterals[i] += resize(laterals[i + 1], *laterals[i].shape[1:3])
    first = laterals[0].shape[1:3]
    *lower, last = laterals
    maps = [conv(x) for conv, x in zip(self.fpn_convs, lower, strict=True)]
    return self.fpn_bottleneck(*(resize(x, *first) for x in (*maps, last)))

  def pyramid_pooling(
    self, x: Float[Array, "B H W _"]
  ) -> Float[Array, "B H W C"]:
    """Convolves the last map together with its averages over regions."""
    pooled = [
      resize(conv(pool(x, size)), *x.shape[1:3])
      for conv, size in zip(self.psp_convs, POOLED_SIZES, strict=True)
    ]
    return self.bottleneck(x, *pooled)


class FCNHead(nnx.Module):
  """One convolution and a classifier: the auxiliary head of training."""

  def __init__(
    self,
    in_channels: int,
    channels: int,
    num_classes: int,
    *,
    dropout_rate: float,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    """Creates the head; see `UPerHead`."""
    self.convs = nnx.List(
      [ConvRelu(in_channels, channels, size=3, dtype=dtype, rngs=rngs)]
    )
    self.classifier = PixelClassifier(
      channels, num_classes, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs
    )

  def __call__(
    self, x: Float[Array, "B H W _"], *, rngs: nnx.Rngs | None = None
  ) -> Float[Array, "B H W K"]:
    """Returns logits at the resolution of the map."""
    for conv in self.convs:
      x = conv(x)
    return self.classifier(x, rngs)
