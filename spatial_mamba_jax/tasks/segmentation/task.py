"""Semantic segmentation as a task of the training loop.

Axis letters: B batch, H and W height and width, h and w those of the decode
head's logits, K classes.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.sources import (
  SegmentedSource,
  Source,
)
from spatial_mamba_jax.models import ModelConfig
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.tasks.base import Batch, Loss
from spatial_mamba_jax.tasks.images import open_classes
from spatial_mamba_jax.tasks.normalisation import normalise
from spatial_mamba_jax.tasks.segmentation.config import SegmentationConfig
from spatial_mamba_jax.tasks.segmentation.evaluation import SegmentationMeter
from spatial_mamba_jax.tasks.segmentation.inference import (
  Windows,
  predict_views,
)
from spatial_mamba_jax.tasks.segmentation.losses import pixel_loss
from spatial_mamba_jax.tasks.segmentation.panels import COLUMNS, PANELS, SCORE


class Prepared(NamedTuple):
  """A batch that is ready for training.

  Attributes:
    images: normalised images.
    labels: classes; `IGNORED` where there is none.
  """

  images: Float[Array, "B H W 3"]
  labels: Int[Array, "B H W"]


class Segmentation:
  """A class for each pixel; it implements `Task`."""

  sums: tuple[str, ...] = ("accuracy", "decode_loss", "auxiliary_loss")
  score = SCORE
  panels = PANELS
  columns = COLUMNS

  def __init__(
    self,
    config: SegmentationConfig,
    model: ModelConfig,
    data: DataConfig,
    *,
    mesa_weight: float,
  ):
    """See `TaskConfig.create`; `model.num_classes` is the config's."""
    self._config, self._model, self._data = config, model, data
    self._mesa_weight = mesa_weight

  def network(self, *, rngs: nnx.Rngs) -> Segmentor:
    """Creates the segmentor."""
    config = self._config
    return Segmentor(
      self._model,
      head_channels=config.head_channels,
      auxiliary_channels=config.auxiliary_channels,
      dropout_rate=config.dropout_rate,
      statistics_group=config.statistics_group,
      rngs=rngs,
    )

  def source(self, split: str) -> SegmentedSource:
    """Opens the images and label maps of a split.

    Raises:
      UserError: the number of classes differs from the network's, or files are
        missing.
    """
    return open_classes(self._data, split, self._config.num_classes)

  def examples(self) -> Any:
    """Returns the functions that turn records into images and label maps."""
    # Imported here, because it needs Pillow.
    from spatial_mamba_jax.tasks.segmentation.examples import (
      SegmentationExamples,
    )

    return SegmentationExamples(self._config, self._data)

  def prepare(self, batch: Batch, key: Array) -> Prepared:
    """Normalises, and pads small crops with ImageNet's mean colour."""
    del key  # The host draws the augmentation.
    images = normalise(batch["image"])
    height, width = jnp.split(batch["size"], 2, axis=1)
    rows, columns = map(jnp.arange, images.shape[1:3])
    inside = (rows[None, :, None] < height[..., None]) & (
      columns[None, None] < width[..., None]
    )
    images = jnp.where(inside[..., None], images, 0)
    return Prepared(images, batch["label"])

  def loss(
    self,
    network: Segmentor,
    batch: Prepared,
    key: Array,
    teacher: Float[Array, "B h w K"] | None,
  ) -> Loss:
    """Computes the cross-entropy of both heads; see `losses`."""
    branch_key, channel_key = jax.random.split(key)
    rngs = nnx.Rngs(drop_path=branch_key, dropout=channel_key)
    logits = network.head_logits(batch.images, rngs=rngs)
    decode = pixel_loss(logits.decode, batch.labels)
    auxiliary = pixel_loss(logits.auxiliary, batch.labels)
    weighted = self._config.auxiliary_weight * auxiliary.value
    value = decode.value + weighted
    if teacher is not None:
      likelihoods = jax.nn.log_softmax(logits.decode)
      mesa = -jnp.mean(jnp.sum(teacher * likelihoods, axis=-1))
      value += self._mesa_weight * mesa
    count = len(batch.images)
    return Loss(
      value,
      {
        "accuracy": count * decode.accuracy,
        "decode_loss": count * decode.value,
        "auxiliary_loss": count * weighted,
      },
    )

  def teach(
    self, network: Segmentor, batch: Prepared
  ) -> Float[Array, "B h w K"]:
    """Computes the probabilities of the classes."""
    return jax.nn.softmax(network.decode_logits(batch.images))

  def predict(self, network: Segmentor, batch: Batch) -> dict[str, Array]:
    """Predicts the class of each pixel.

    Returns:
      `predicted` [B, H, W]: the classes; anything outside of an image's size.
      `label` [B, H, W] and `size` [B, 2]: from the batch.
    """
    config = self._config
    views = [
      normalise(batch[f"image_{i}"]) for i in range(len(config.test_ratios))
    ]
    windows = (
      Windows(config.test_window, config.test_stride)
      if config.test_window
      else None
    )
    labels, sizes = batch["label"], batch["size"]
    predicted = predict_views(
      network.decode_logits,
      views,
      sizes,
      *labels.shape[1:3],
      flip=config.test_flip,
      windows=windows,
    )
    return {"predicted": predicted, "label": labels, "size": sizes}

  def meter(self, source: Source) -> SegmentationMeter:
    """Returns an empty meter for the label maps of all images."""
    assert isinstance(source, SegmentedSource)
    return SegmentationMeter(source)

  def logged(self, sums: Mapping[str, float]) -> dict[str, float]:
    """Returns both heads' losses, and the accuracy on augmented images."""
    return {name: sums[name] / sums["images"] for name in self.sums}
