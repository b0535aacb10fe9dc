"""Classification as a task of the training loop.

Axis letters: B batch, H and W height and width, K classes, M = min(5, K).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.sources import LabelledSource, Source
from spatial_mamba_jax.models import Classifier, ModelConfig
from spatial_mamba_jax.tasks.base import Batch, Loss
from spatial_mamba_jax.tasks.classification.config import ClassificationConfig
from spatial_mamba_jax.tasks.classification.evaluation import (
  ClassificationMeter,
)
from spatial_mamba_jax.tasks.classification.losses import soft_cross_entropy
from spatial_mamba_jax.tasks.classification.panels import (
  COLUMNS,
  PANELS,
  SCORE,
)
from spatial_mamba_jax.tasks.classification.preprocess import prepare
from spatial_mamba_jax.tasks.images import open_classes
from spatial_mamba_jax.tasks.normalisation import normalise


class Prepared(NamedTuple):
  """A batch that is ready for training.

  Attributes:
    images: normalised images.
    target: distributions over classes.
  """

  images: Float[Array, "B H W 3"]
  target: Float[Array, "B K"]


class Classification:
  """One label an image; it implements `Task`."""

  sums: tuple[str, ...] = ("correct",)
  score = SCORE
  panels = PANELS
  columns = COLUMNS

  def __init__(
    self,
    config: ClassificationConfig,
    model: ModelConfig,
    data: DataConfig,
    *,
    mesa_weight: float,
  ):
    """See `TaskConfig.create`."""
    self._config, self._model, self._data = config, model, data
    self._mesa_weight = mesa_weight

  def network(self, *, rngs: nnx.Rngs) -> Classifier:
    """Creates the classifier."""
    return self._model.family.classifier(self._model, rngs=rngs)

  def source(self, split: str) -> LabelledSource:
    """Opens the images of a split.

    Raises:
      UserError: the number of classes differs from the network's, or the images
        are missing.
    """
    return open_classes(self._data, split, self._config.num_classes)

  def examples(self) -> Any:
    """Returns the functions that turn records into labelled images."""
    # Imported here, because it needs Pillow.
    from spatial_mamba_jax.data.labelled_images import LabelledImages

    return LabelledImages(self._config.num_classes, self._data)

  def prepare(self, batch: Batch, key: Array) -> Prepared:
    """Normalises, erases, smooths labels and mixes; see `preprocess`."""
    return Prepared(*prepare(batch, key, self._config))

  def loss(
    self,
    network: Any,
    batch: Prepared,
    key: Array,
    teacher: Float[Array, "B K"] | None,
  ) -> Loss:
    """Computes the cross-entropy against the targets and the teacher."""
    logits = network(batch.images, rngs=nnx.Rngs(drop_path=key))
    value = jnp.mean(soft_cross_entropy(logits, batch.target))
    if teacher is not None:
      mesa = jnp.mean(soft_cross_entropy(logits, teacher))
      value += self._mesa_weight * mesa
    hits = jnp.argmax(logits, -1) == jnp.argmax(batch.target, -1)
    return Loss(value, {"correct": jnp.sum(hits)})

  def teach(self, network: Any, batch: Prepared) -> Float[Array, "B K"]:
    """Computes the probabilities of the classes."""
    return jax.nn.softmax(network(batch.images))

  def predict(self, network: Any, batch: Batch) -> dict[str, Array]:
    """Predicts the class of each image.

    Returns:
      `label` [B]: the true class, from the batch.
      `predicted` [B]: the class that scores highest; -1 (undecided) for a tie,
        and for logits that are not finite.
      `rank` [B]: how many other classes score at least as high as the label.
      `loss` [B]: cross-entropy in nats; NaN if the logits are not finite.
      `top_classes`, `top_probabilities` [B, M]: the most probable classes.
    """
    logits = network(normalise(batch["image"]))
    log_probabilities = jax.nn.log_softmax(logits)
    label = batch["label"][:, None]
    loss = -jnp.take_along_axis(log_probabilities, label, axis=-1)[:, 0]
    # NaN counts as scoring at least as high: no comparison with it is true.
    own = jnp.take_along_axis(logits, label, axis=-1)
    rank = jnp.sum(~(logits < own), axis=-1) - 1
    highest = jnp.max(logits, axis=-1, keepdims=True)
    is_single = jnp.sum(logits == highest, axis=-1) == 1
    top, top_classes = jax.lax.top_k(
      log_probabilities, min(5, logits.shape[-1])
    )
    return {
      "label": batch["label"],
      "predicted": jnp.where(
        is_single & ~jnp.isnan(loss), jnp.argmax(logits, axis=-1), -1
      ),
      "rank": rank,
      "loss": loss,
      "top_classes": top_classes,
      "top_probabilities": jnp.exp(top),
    }

  def meter(self, source: Source) -> ClassificationMeter:
    """Returns an empty meter for the predictions of all images."""
    assert isinstance(source, LabelledSource)
    return ClassificationMeter(source)

  def logged(self, sums: Mapping[str, float]) -> dict[str, float]:
    """Returns the accuracy on augmented images."""
    return {"accuracy": sums["correct"] / sums["images"]}
