"""Hierarchical networks: a stem, then stages with downsampling between them.

The config selects the parts, as a `Family`, and the token mixer.

Axis letters: B batch, H and W height and width, C channels, K classes.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from spatial_mamba_kernels import check_only_batch_is_split
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import show
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.layers import drop_path_scales, linear
from spatial_mamba_jax.models.mixers.base import Place
from spatial_mamba_jax.models.norms import LayerNorm
from spatial_mamba_jax.models.stage import Stage


class FeatureInfo(NamedTuple):
  """A description of a stage's features.

  Attributes:
    stage: index of the stage.
    channels: number of channels.
    stride: pixels of the image along a side of a token.
  """

  stage: int
  channels: int
  stride: int


class Trunk(nnx.Module):
  """Stem, stages and the downsampling between them.

  Attributes:
    config: the architecture.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    dims, family = config.dims, config.family
    self.config = config
    self.stem = family.stem(dims[0], config=config, rngs=rngs)
    self.stages = nnx.List(
      [
        Stage(
          partial(_create_block, config, dim),
          [config.mixer.variant(place) for place in places],
          remat=config.remat,
          rngs=rngs,
        )
        for dim, places in zip(dims, places(config.depths), strict=True)
      ]
    )
    self.downsamples = nnx.List(
      [
        family.downsampling(dim, dim_out, config=config, rngs=rngs)
        for dim, dim_out in itertools.pairwise(dims)
      ]
    )
    self.deterministic = True

  @property
  def num_features(self) -> int:
    """Channels of the last stage."""
    return self.config.dims[-1]

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Descriptions of the features of each stage."""
    return tuple(
      FeatureInfo(stage, channels, 4 * 2**stage)
      for stage, channels in enumerate(self.config.dims)
    )

  def _stage_features(
    self, images: ArrayLike, rngs: nnx.Rngs | None
  ) -> Iterator[Float[Array, "B H W C"]]:
    """Yields each stage's tokens, before downsampling."""
    channels = self.config.in_channels
    x = self.stem(check_images(images, channels).astype(self.config.dtype))
    scales = self._drop_path_scales(rngs, x.shape[0])
    for i, stage in enumerate(self.stages):
      if i > 0:
        x = self.downsamples[i - 1](x)
      x = stage(x, scales[i])
      yield x

  def _drop_path_scales(self, rngs, batch):
    """Returns the argument `scales` of each stage."""
    depths = self.config.depths
    if self.deterministic or not self.config.drop_path_rate:
      return [None] * len(depths)
    if rngs is None:
      raise ValueError(
        "training with drop path is random: call model(images,"
        " rngs=nnx.Rngs(drop_path=key)), or model.eval() first"
      )
    rates = list(itertools.chain(*self.config.drop_path_rates))
    scales = drop_path_scales(rngs.drop_path(), rates, batch)
    return jnp.split(scales, list(itertools.accumulate(depths[:-1])))


def _create_block(config, dim, variant, rngs):
  return config.family.block(dim, variant, config=config, rngs=rngs)


def places(depths: Sequence[int]) -> Iterator[list[Place]]:
  """Yields the places of the blocks, a list for each stage."""
  index = itertools.count()
  for stage, depth in enumerate(depths):
    yield [Place(stage, block, next(index)) for block in range(depth)]


class Classifier(Trunk):
  """An image classifier: the mean of normalised tokens, and a linear head.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    dtype = config.param_dtype
    self.norm = LayerNorm(config.dims[-1], dtype=dtype, rngs=rngs)
    self.head = linear(
      config.dims[-1], config.num_classes, dtype=dtype, rngs=rngs
    )

  def __call__(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> Float[Array, "B K"]:
    """Classifies images of any height and width.

    Args:
      images: [B, H, W, in_channels], floating point, normalised; RGB by
        ImageNet's mean and standard deviation.
      rngs: random streams; `drop_path` is needed in training mode, unless
        `drop_path_rate` is 0.

    Returns:
      Logits [B, K], float32 (float64 if the model's dtype is float64).

    Raises:
      ValueError: `images` has a wrong shape or dtype, or `rngs` is missing.
    """
    *_, x = self._stage_features(images, rngs)
    return self.head(self._pool(self.norm(x)))

  def forward_features(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> Float[Array, "B h w C"]:
    """Computes the normalised tokens of the last stage.

    `model.forward_head(model.forward_features(images))` is `model(images)`.

    Args:
      images: as for `__call__`.
      rngs: as for `__call__`.

    Returns:
      [B, H / 32, W / 32, num_features] (rounded up) of a network of four
      stages.

    Raises:
      ValueError: as for `__call__`.
    """
    *_, x = self._stage_features(images, rngs)
    return self.norm(x)

  def forward_head(
    self, features: Float[Array, "B h w C"], *, pre_logits: bool = False
  ) -> Float[Array, "B K"] | Float[Array, "B C"]:
    """Computes logits of `forward_features`'s tokens.

    Args:
      features: normalised tokens.
      pre_logits: whether to return the mean of the tokens, before the head.
    """
    pooled = self._pool(features)
    return pooled if pre_logits else self.head(pooled)

  def forward_intermediates(
    self,
    images: ArrayLike,
    indices: int | Sequence[int] | None = None,
    *,
    rngs: nnx.Rngs | None = None,
  ) -> tuple[Float[Array, "B h w C"], list[Float[Array, "B Hi Wi Ci"]]]:
    """Computes the features of the last stage and of others.

    Args:
      images: as for `__call__`.
      indices: the stages, from 0, or from the last by -1; a number n for the
        last n stages; None for all.
      rngs: as for `__call__`.

    Returns:
      The result of `forward_features`, and the tokens of each stage in
      `indices`, before norm and downsampling, in rising order.

    Raises:
      ValueError: as for `__call__`, or an index is no stage.
    """
    stages = _stage_indices(indices, len(self.config.dims))
    features = list(self._stage_features(images, rngs))
    return self.norm(features[-1]), [features[i] for i in stages]

  def reset_classifier(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
    """Replaces the head by a new one with other classes, in place.

    Args:
      num_classes: classes of the new head. `model.config` forgets the names of
        the old ones.
      rngs: random streams; `params` initialises the head's weights.

    Raises:
      ValueError: `num_classes` is not from 1 to 2**20.
    """
    config = dataclasses.replace(
      self.config, num_classes=num_classes, class_names=()
    )
    self.head = linear(
      self.num_features, num_classes, dtype=config.param_dtype, rngs=rngs
    )
    self.config = config

  def _pool(self, features):
    return jnp.mean(features, axis=(1, 2))


def _stage_indices(
  indices: int | Sequence[int] | None, stages: int
) -> list[int]:
  if indices is None:
    return list(range(stages))
  if isinstance(indices, int):
    found = set(range(stages - indices, stages))
  else:
    found = {i + stages if i < 0 else i for i in indices}
  if not found or not found <= set(range(stages)):
    raise UserError(
      f"indices must be some of the {stages} stages, from {-stages} to"
      f" {stages - 1}, or the number of the last stages: got {show(indices)}"
    )
  return sorted(found)


class Backbone(Trunk):
  """Feature maps for detection, segmentation and other dense tasks.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    stages = range(len(config.dims))
    if not out_indices or not set(out_indices) <= set(stages):
      raise ValueError(
        f"out_indices must be some of the stages {tuple(stages)}, not"
        f" {tuple(out_indices)}"
      )
    self.norms = nnx.Dict(
      {
        str(i): LayerNorm(config.dims[i], dtype=config.dtype, rngs=rngs)
        for i in out_indices
      }
    )

  def __call__(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> list[Float[Array, "B Hi Wi Ci"]]:
    """Computes feature maps of images of any height and width.

    Args:
      images: as for a classifier.
      rngs: as for a classifier.

    Returns:
      The normalised features of each stage i in `out_indices`, in rising order,
      [B, H / (4 * 2**i), W / (4 * 2**i), dims[i]] (rounded up).

    Raises:
      ValueError: as for a classifier.
    """
    return [
      self.norms[str(i)](x)
      for i, x in enumerate(self._stage_features(images, rngs))
      if str(i) in self.norms
    ]

  @property
  def feature_info(self) -> tuple[FeatureInfo, ...]:
    """Descriptions of the features that a call returns."""
    return tuple(
      info for info in super().feature_info if str(info.stage) in self.norms
    )


# Not a method: `nnx.tabulate` fails on public methods that take None.
def stage_features(
  model: Trunk, images: ArrayLike
) -> list[Float[Array, "B H W C"]]:
  """Returns the tokens of each stage, before norm and downsampling.

  Args:
    model: in eval mode, or with a `drop_path_rate` of 0.
    images: as for a classifier.

  Raises:
    ValueError: as for a classifier.
  """
  return list(model._stage_features(images, None))


def check_images(images: ArrayLike, channels: int) -> Array:
  """Returns the images as an array, or raises a ValueError."""
  array = jnp.asarray(images)
  if array.ndim != 4 or array.shape[-1] != channels or not array.size:
    raise ValueError(
      f"images must have shape [B, H, W, {channels}], not {list(array.shape)}"
    )
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(
      f"images must be floating point and normalised, not {array.dtype}"
    )
  check_only_batch_is_split(array)
  return array
