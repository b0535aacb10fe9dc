"""What weights make of every image of a split, and how right they are.

Axis letters: N images, K classes, M = min(5, K).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from spatial_mamba_jax.data import DataConfig, Source, evaluation_batches
from spatial_mamba_jax.training.sharding import shard_batch
from spatial_mamba_jax.training.state import Arrays, Weights

_CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How right some weights are.

  Attributes:
    top1: share of images whose label scores highest.
    top5: share of images whose label is among the five highest.
    loss: mean cross-entropy, in nats.
    ece: expected calibration error, see `calibration_error`.
    images: images counted.
    undecided: those of them for which no single class scores highest, because
      of a tie or of logits that are not finite. They count as wrong; loss and
      calibration error are NaN if logits are not finite.
    unreadable: images that could not be read, and are not counted.
  """

  top1: float
  top5: float
  loss: float
  ece: float
  images: int
  undecided: int
  unreadable: int

  def __str__(self) -> str:
    line = (
      f"top-1 {100 * self.top1:.2f}%  top-5 {100 * self.top5:.2f}%"
      f"  loss {self.loss:.4f}  ECE {100 * self.ece:.2f}%"
      f"  images {self.images}"
    )
    for name in ("undecided", "unreadable"):
      if count := getattr(self, name):
        line += f"  {name} {count}"
    return line

  def to_json(self) -> dict[str, float | int | None]:
    """The attributes; None for NaN and infinity, which JSON has not."""
    return {
      name: value if np.isfinite(value) else None
      for name, value in dataclasses.asdict(self).items()
    }


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What some weights make of each image, in the source's order.

  Attributes:
    index: [N], the images' places in the source.
    label: [N], their classes.
    predicted: [N], the classes that score highest; -1 for those undecided.
    rank: [N], how many other classes score no less than the label.
    loss: [N], cross-entropy in nats.
    top_classes: [N, M], the likeliest classes.
    top_probabilities: [N, M], theirs.
    unreadable: places in the source of the images that could not be read.
  """

  index: np.ndarray
  label: np.ndarray
  predicted: np.ndarray
  rank: np.ndarray
  loss: np.ndarray
  top_classes: np.ndarray
  top_probabilities: np.ndarray
  unreadable: np.ndarray

  @property
  def in_top1(self) -> np.ndarray:
    """[N], whether the label scores highest."""
    return self.predicted == self.label

  @property
  def in_top5(self) -> np.ndarray:
    """[N], whether the label is among the five highest."""
    return (self.rank < 5) & ~np.isnan(self.loss)

  def evaluation(self) -> Evaluation:
    """The means over all images."""
    images = len(self.index)
    return Evaluation(
      top1=int(self.in_top1.sum()) / max(images, 1),
      top5=int(self.in_top5.sum()) / max(images, 1),
      # float64: float32 would lose digits of a sum over many images.
      loss=float(self.loss.sum(dtype=np.float64)) / max(images, 1),
      ece=calibration_error(self.top_probabilities[:, 0], self.in_top1),
      images=images,
      undecided=int((self.predicted < 0).sum()),
      unreadable=len(self.unreadable),
    )

  def confusion(self, num_classes: int) -> np.ndarray:
    """Images [K, K] by label (row) and prediction, but for those undecided."""
    decided = self.predicted >= 0
    rows = self.label[decided].astype(np.int64)
    places = rows * num_classes + self.predicted[decided]
    counts = np.bincount(places, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
  """The expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3).

  The mean distance between confidence and accuracy in 15 bins of equal width,
  open below and closed above, weighted by the images in each.

  Args:
    confidence: [N], the probability of the likeliest class.
    correct: [N], whether it is the label.

  Returns:
    From 0 to 1; NaN where a confidence is.
  """
  if np.isnan(confidence).any():
    return float("nan")
  edges = np.linspace(0, 1, _CALIBRATION_BINS + 1)
  bins = np.searchsorted(edges[1:-1], confidence)
  excess = np.bincount(bins, confidence.astype(np.float64) - correct)
  return float(np.abs(excess).sum()) / max(len(confidence), 1)


def predict(
  eval_step: Callable[[Weights, dict[str, jax.Array]], Arrays],
  weights: Mapping[str, Weights],
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  mesh: Mesh,
) -> dict[str, Predictions]:
  """Shows every image of a source to each of several sets of weights.

  Args:
    eval_step: from `make_eval_step`, jitted, its results replicated.
    weights: {name: weights}, replicated over the mesh.
    source: the images, each of which is read once.
    config: their transforms.
    batch_size: images a step, over all processes and devices.
    mesh: the devices.

  Returns:
    {name: predictions}, the same in every process.
  """
  parts = []
  with evaluation_batches(
    source,
    config,
    batch_size=batch_size // jax.process_count(),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  ) as batches:
    # One step behind, so that the device works while the next batch is read.
    steps = (
      {name: eval_step(each, batch) for name, each in weights.items()}
      for batch in (shard_batch(batch, mesh) for batch in batches)
    )
    for step, _ in itertools.pairwise(itertools.chain(steps, (None,))):
      parts.append(jax.device_get(step))
  return {
    name: _in_order([part[name] for part in parts], len(source))
    for name in weights
  }


def _in_order(parts: list[Arrays], num_images: int) -> Predictions:
  """The images of all batches in the source's order, without padding."""
  columns = {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }
  # Padding has the places beyond the source's end.
  order = np.argsort(columns["index"])[:num_images]
  columns = {name: column[order] for name, column in columns.items()}
  mask = columns.pop("mask")
  return Predictions(
    unreadable=columns["index"][~mask],
    **{name: column[mask] for name, column in columns.items()},
  )
