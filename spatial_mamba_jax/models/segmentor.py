"""A backbone with UPerNet's heads, for semantic segmentation.

Axis letters: B batch, H and W height and width, K classes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.heads.resampling import resize
from spatial_mamba_jax.models.heads.upernet import FCNHead, UPerHead
from spatial_mamba_jax.models.norms import BatchNorm
from spatial_mamba_jax.models.presets import get_model_config

# Attributes of a segmentor, beside its backbone.
HEADS = ("decode_head", "auxiliary_head")


class HeadLogits(NamedTuple):
  """Logits at the resolutions of the heads.

  Attributes:
    decode: of the decode head, a quarter of the image's height and width.
    auxiliary: of the auxiliary head, on the third of four stages.
  """

  decode: Float[Array, "B Hd Wd K"]
  auxiliary: Float[Array, "B Ha Wa K"]


class Segmentor(nnx.Module):
  """Predicts a class for each pixel."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    head_channels: int = 512,
    auxiliary_channels: int = 256,
    dropout_rate: float = 0.1,
    statistics_group: int | None = None,
    rngs: nnx.Rngs,
  ):
    """Creates the network with mmsegmentation's initialisation of the heads.

    Args:
      config: the architecture, of two stages or more.
      head_channels: channels of the decode head.
      auxiliary_channels: channels of the auxiliary head, on the last stage but
        one.
      dropout_rate: probability of dropping a channel before a classifier.
      statistics_group: images that share the statistics of a BatchNorm of the
        backbone in training; None for a whole batch.
      rngs: random streams; `params` initialises the weights.

    Raises:
      UserError: the architecture has one stage.
    """
    if len(config.dims) < 2:
      raise UserError(
        f"dims must name two stages or more for segmentation, got {config.dims}"
      )
    self.backbone = config.family.backbone(
      config, out_indices=tuple(range(len(config.dims))), rngs=rngs
    )
    for _, module in nnx.iter_graph(self.backbone):
      if isinstance(module, BatchNorm):
        module.group = statistics_group
    options = {"dtype": config.dtype, "rngs": rngs}
    options["dropout_rate"] = dropout_rate
    classes = config.num_classes
    self.decode_head = UPerHead(config.dims, head_channels, classes, **options)
    self.auxiliary_head = FCNHead(
      config.dims[-2], auxiliary_channels, classes, **options
    )
    self.deterministic = True

  @property
  def config(self) -> ModelConfig:
    """The architecture of the backbone; `num_classes` is K."""
    return self.backbone.config

  @property
  def channels(self) -> tuple[int, int]:
    """Channels of the decode head, and of the auxiliary head."""
    heads = self.decode_head.classifier, self.auxiliary_head.classifier
    decode, auxiliary = (head.linear.in_features for head in heads)
    return decode, auxiliary

  def __call__(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> Float[Array, "B H W K"]:
    """Predicts the class of each pixel.

    Args:
      images: [B, H, W, in_channels] of any height and width, floating point,
        normalised; RGB by ImageNet's mean and standard deviation.
      rngs: random streams; `drop_path` and `dropout` are needed in training
        mode.

    Returns:
      Logits [B, H, W, K] at the size of the images, float32 (float64 if the
      model's dtype is float64).

    Raises:
      ValueError: `images` has a wrong shape or dtype, or `rngs` is missing.
    """
    logits = self.decode_logits(images, rngs=rngs)
    return resize(logits, *jnp.shape(images)[1:3])

  def decode_logits(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> Float[Array, "B Hd Wd K"]:
    """Returns the logits of the decode head, at its own resolution."""
    return self.decode_head(self.backbone(images, rngs=rngs), rngs=rngs)

  def head_logits(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> HeadLogits:
    """Returns the logits of both heads, for training; see `__call__`."""
    features = self.backbone(images, rngs=rngs)
    return HeadLogits(
      self.decode_head(features, rngs=rngs),
      self.auxiliary_head(features[-2], rngs=rngs),
    )


def create_segmentor(
  name: str,
  *,
  num_classes: int = 150,
  head_channels: int = 512,
  auxiliary_channels: int = 256,
  rngs: nnx.Rngs,
  **overrides: Any,
) -> Segmentor:
  """Creates UPerNet on a named backbone, in eval mode.

      model = create_segmentor("spatial_mamba_tiny", rngs=nnx.Rngs(0))
      logits = model(images)  # [B, H, W, 150]

  Args:
    name: one of `list_models()`.
    num_classes: K.
    head_channels: channels of the decode head.
    auxiliary_channels: channels of the auxiliary head, which only training
      uses.
    rngs: random streams; `params` initialises the weights.
    **overrides: fields of `ModelConfig` to replace.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  config = get_model_config(name, num_classes=num_classes, **overrides)
  return Segmentor(
    config,
    head_channels=head_channels,
    auxiliary_channels=auxiliary_channels,
    rngs=rngs,
  )
