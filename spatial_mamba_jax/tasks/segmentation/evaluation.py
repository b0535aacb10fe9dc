"""Mean intersection over union (IoU) of predicted label maps.

Axis letters: B batch, H and W height and width, K classes.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spatial_mamba_jax.data.label_maps import IGNORED
from spatial_mamba_jax.data.sources import SegmentedSource
from spatial_mamba_jax.tasks.base import Evaluation


class LabelMaps(NamedTuple):
  """The predicted and the true classes of an image.

  Attributes:
    predicted: int16 [H, W].
    label: int16 [H, W]; `IGNORED` where there is none.
  """

  predicted: np.ndarray
  label: np.ndarray


@dataclasses.dataclass(frozen=True)
class PixelCounts:
  """Numbers of labelled pixels of each class: int64 [K].

  They are those of mmsegmentation 1.2.2's IoUMetric. Its sums are float32 and
  lose pixels of a class that has more than 2**24; these are exact.

  Attributes:
    intersection: pixels that are predicted and labelled as the class.
    predicted: pixels that are predicted as the class.
    labelled: pixels that are labelled as the class.
  """

  intersection: np.ndarray
  predicted: np.ndarray
  labelled: np.ndarray

  @classmethod
  def of(cls, maps: LabelMaps, num_classes: int) -> "PixelCounts":
    """Counts the pixels of an image."""
    is_labelled = maps.label != IGNORED
    predicted, label = maps.predicted[is_labelled], maps.label[is_labelled]
    parts = label[label == predicted], predicted, label
    return cls(*(np.bincount(part, minlength=num_classes) for part in parts))

  def __add__(self, other: "PixelCounts") -> "PixelCounts":
    return PixelCounts(
      self.intersection + other.intersection,
      self.predicted + other.predicted,
      self.labelled + other.labelled,
    )

  @property
  def iou(self) -> np.ndarray:
    """[K], intersection over union; NaN for a class that is in neither."""
    union = self.predicted + self.labelled - self.intersection
    return _shares(self.intersection, union)

  @property
  def accuracy(self) -> np.ndarray:
    """[K], share of the labelled pixels; NaN for a class without a label."""
    return _shares(self.intersection, self.labelled)

  @property
  def pixel_accuracy(self) -> float:
    """Share of all labelled pixels; NaN if there are none."""
    return self.intersection.sum() / (self.labelled.sum() or np.nan)


class PackedMaps:
  """The label maps of many images, compressed in memory."""

  def __init__(self):
    self._packed: dict[int, tuple[tuple[int, ...], bytes]] = {}

  def __len__(self) -> int:
    return len(self._packed)

  def __getitem__(self, index: int) -> LabelMaps:
    """Returns the label maps of an image by its index in the source."""
    shape, data = self._packed[index]
    maps = np.frombuffer(zlib.decompress(data), np.int16)
    return LabelMaps(*maps.reshape(2, *shape))

  @property
  def indices(self) -> Sequence[int]:
    """The indices of the images, in the source's order."""
    return sorted(self._packed)

  def add(self, index: int, maps: LabelMaps) -> None:
    """Adds the label maps of an image."""
    # Level 1 is fast, and label maps are simple.
    data = zlib.compress(np.stack(maps).astype(np.int16).tobytes(), 1)
    self._packed[index] = maps.label.shape, data


class SegmentationMeter:
  """Accumulates the predictions for all images; it implements `PictureMeter`.

  Attributes:
    counts: the pixels of each class, over all images.
    maps: the label maps of each image.
  """

  def __init__(self, source: SegmentedSource):
    """Starts empty; `source` has the images and the names of classes."""
    self._source = source
    none = np.zeros(source.num_classes, np.int64)
    self.counts, self.maps = PixelCounts(none, none, none), PackedMaps()

  def add(self, columns: dict[str, np.ndarray]) -> None:
    """Adds a batch of results of `Segmentation.predict`."""
    names = ("index", "predicted", "label", "size")
    for index, predicted, label, (height, width) in zip(
      *(columns[name] for name in names), strict=True
    ):
      maps = LabelMaps(predicted[:height, :width], label[:height, :width])
      self.counts += PixelCounts.of(maps, self._source.num_classes)
      self.maps.add(int(index), maps)

  def result(self, unreadable: int) -> Evaluation:
    """Returns the means over all classes and pixels.

    Args:
      unreadable: number of images that could not be read.

    Returns:
      An evaluation with the values
      `miou`: mean IoU of the classes that are labelled or predicted anywhere;
        the score.
      `mean_accuracy`: mean accuracy of the classes that are labelled anywhere.
      `pixel_accuracy`: share of all labelled pixels whose class is predicted.
      `images`: number of images, without unreadable ones.
      `unreadable`: as given.
      The shares are NaN if no pixel is labelled.
    """
    values = {
      "miou": _mean(self.counts.iou),
      "mean_accuracy": _mean(self.counts.accuracy),
      "pixel_accuracy": self.counts.pixel_accuracy,
      "images": len(self.maps),
      "unreadable": unreadable,
    }
    return Evaluation(values["miou"], values, _line(values))

  def write(self, directory: pathlib.Path) -> None:
    """Writes the files of `write_predictions`."""
    # Imported here, because it needs Pillow and matplotlib.
    from spatial_mamba_jax.tasks.segmentation.prediction_files import (
      write_predictions,
    )

    write_predictions(directory, self.counts, self.maps, self._source)

  def picture(self, title: str) -> bytes:
    """Draws a few images with their label maps; see `PictureMeter`."""
    from spatial_mamba_jax.tasks.segmentation.pictures import draw_examples

    return draw_examples(title, self.maps, self._source)


def _shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  """Divides counts; returns NaN where both are 0."""
  with np.errstate(invalid="ignore"):
    return part / whole


def _mean(values: np.ndarray) -> float:
  """Returns the mean without NaNs; NaN if there are no other values."""
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else float("nan")


def _line(values: Mapping[str, float | int]) -> str:
  counts = f"{values['images']:,} images"
  if unreadable := values["unreadable"]:
    counts += f", {unreadable:,} unreadable"
  return (
    f"mIoU {100 * values['miou']:.2f}%,"
    f" mAcc {100 * values['mean_accuracy']:.2f}%,"
    f" aAcc {100 * values['pixel_accuracy']:.2f}% ({counts})"
  )
