"""Accuracy, loss and calibration of predicted classes.

Axis letters: N images, K classes, M = min(5, K).
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from spatial_mamba_jax.data.sources import LabelledSource
from spatial_mamba_jax.tasks.base import Evaluation

_CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predictions for each image, in the source's order.

  Attributes:
    index: [N], the image's index in the source.
    label: [N], the true class.
    predicted: [N], the class that scores highest; -1 if undecided.
    rank: [N], how many other classes score at least as high as the label.
    loss: [N], cross-entropy in nats.
    top_classes: [N, M], the most probable classes.
    top_probabilities: [N, M], their probabilities.
  """

  index: np.ndarray
  label: np.ndarray
  predicted: np.ndarray
  rank: np.ndarray
  loss: np.ndarray
  top_classes: np.ndarray
  top_probabilities: np.ndarray

  @property
  def in_top1(self) -> np.ndarray:
    """[N], whether the label scores highest."""
    return self.predicted == self.label

  @property
  def in_top5(self) -> np.ndarray:
    """[N], whether the label is among the five highest."""
    return (self.rank < 5) & ~np.isnan(self.loss)

  def evaluation(self, unreadable: int = 0) -> Evaluation:
    """Returns the means over all images.

    Args:
      unreadable: number of images that could not be read.

    Returns:
      An evaluation with the values
      `top1`: share of images whose label scores highest; the score.
      `top5`: share of images whose label is among the five highest.
      `loss`: mean cross-entropy, in nats.
      `ece`: expected calibration error, see `calibration_error`.
      `images`: number of images, without unreadable ones.
      `undecided`: number of images for which no single class scores highest,
        because of a tie or of logits that are not finite. They count as wrong;
        loss and calibration error are NaN if logits are not finite.
      `unreadable`: as given.
    """
    images = len(self.index)
    values = {
      "top1": int(self.in_top1.sum()) / max(images, 1),
      "top5": int(self.in_top5.sum()) / max(images, 1),
      # float64: float32 would lose digits of a sum over many images.
      "loss": float(self.loss.sum(dtype=np.float64)) / max(images, 1),
      "ece": calibration_error(self.top_probabilities[:, 0], self.in_top1),
      "images": images,
      "undecided": int((self.predicted < 0).sum()),
      "unreadable": unreadable,
    }
    return Evaluation(values["top1"], values, _line(values))

  def confusion(self, num_classes: int) -> np.ndarray:
    """Counts the decided images by label (row) and prediction: [K, K]."""
    decided = self.predicted >= 0
    rows = self.label[decided].astype(np.int64)
    cells = rows * num_classes + self.predicted[decided]
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
  """Computes the expected calibration error (equation 3 of arXiv 1706.04599).

  It is the mean distance between confidence and accuracy over 15 bins of equal
  width, open below and closed above, weighted by the images in each bin.

  Args:
    confidence: [N], the probability of the most probable class.
    correct: [N], whether that class is the label.

  Returns:
    The error, from 0 to 1; NaN if a confidence is NaN.
  """
  if np.isnan(confidence).any():
    return float("nan")
  edges = np.linspace(0, 1, _CALIBRATION_BINS + 1)
  bins = np.searchsorted(edges[1:-1], confidence)
  excess = np.bincount(bins, confidence.astype(np.float64) - correct)
  return float(np.abs(excess).sum()) / max(len(confidence), 1)


class ClassificationMeter:
  """Accumulates the predictions for all images; it implements `Meter`."""

  def __init__(self, source: LabelledSource):
    """Starts empty; `source` has the names of images and classes."""
    self._source = source
    self._parts: list[dict[str, np.ndarray]] = []

  def add(self, columns: dict[str, np.ndarray]) -> None:
    """Adds a batch of results of `Classification.predict`."""
    self._parts.append(columns)

  def result(self, unreadable: int) -> Evaluation:
    """Returns the means over all images."""
    return self.predictions().evaluation(unreadable)

  def write(self, directory: pathlib.Path) -> None:
    """Writes the files of `write_predictions`."""
    # Imported here, because it needs matplotlib.
    from spatial_mamba_jax.tasks.classification.prediction_files import (
      write_predictions,
    )

    write_predictions(directory, self.predictions(), self._source)

  def predictions(self) -> Predictions:
    """Returns the predictions for all images, in the source's order."""
    columns = {
      field.name: np.concatenate([part[field.name] for part in self._parts])
      for field in dataclasses.fields(Predictions)
    }
    order = np.argsort(columns["index"])
    return Predictions(**{name: x[order] for name, x in columns.items()})


def _line(values: Mapping[str, float | int]) -> str:
  line = (
    f"top-1 {100 * values['top1']:.2f}%  top-5 {100 * values['top5']:.2f}%"
    f"  loss {values['loss']:.4f}  ECE {100 * values['ece']:.2f}%"
    f"  images {values['images']}"
  )
  for name in ("undecided", "unreadable"):
    if count := values[name]:
      line += f"  {name} {count}"
  return line
