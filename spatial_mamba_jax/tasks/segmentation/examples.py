"""Examples of images with label maps."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.decoding import decode_upright
from spatial_mamba_jax.data.examples import Group
from spatial_mamba_jax.data.label_maps import IGNORED, read_label_map
from spatial_mamba_jax.data.photometric import distort, draw_distortion
from spatial_mamba_jax.data.resizing import (
  Window,
  rescaled_size,
  resize_image,
  resize_labels,
)
from spatial_mamba_jax.data.sources import SegmentedSource, Source
from spatial_mamba_jax.tasks.segmentation.config import SegmentationConfig

# Most draws of a crop after the first.
_REDRAWS = 10


class SegmentedImage(NamedTuple):
  """A decoded image, uint8 [H, W, 3], and its labels, int16 [H, W]."""

  image: np.ndarray
  labels: np.ndarray


class Shapes(NamedTuple):
  """Heights and widths of a group's examples for evaluation, in pixels.

  Attributes:
    views: those of the resized image, by `test_ratios`.
    label: those of the label map, in which each of the group's fits.
  """

  views: tuple[tuple[int, int], ...]
  label: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class SegmentationExamples:
  """Turns records of a `SegmentedSource` into images with label maps.

  It implements `GroupedExamples`. Labels are int16; pixels without a class have
  `IGNORED`.

  An example for training has "image", uint8 [S, S, 3], and "label", [S, S],
  where S is `data.image_size`. Only the first "size", int32 [2], height and
  width, hold the crop; beyond are black pixels without a class.

  An example for evaluation has "image_0", "image_1", ..., the image resized by
  each of `test_ratios`, uint8 [h, w, 3]; the "label" of the image as it is,
  padded with `IGNORED` at the bottom and right; and the "size" of the image.

  Attributes:
    config: the config of the task.
    data: the config of the pipeline.
    shapes: the shapes of the group whose records it reads; None to evaluate
      records of any shape, one by one. A blank example has then the shapes of
      an image of S x S pixels.
  """

  config: SegmentationConfig
  data: DataConfig
  shapes: Shapes | None = None

  def read(self, record: Mapping[str, Any]) -> SegmentedImage:
    """Decodes an image and its label map.

    Raises:
      WrongRecordError: the label map does not fit the image or the classes.
    """
    image = np.asarray(decode_upright(record["image"], self.data.decoder))
    size = image.shape[0], image.shape[1]
    labels = read_label_map(record, self.config.num_classes, size)
    return SegmentedImage(image, labels)

  def train(
    self, decoded: SegmentedImage, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Resizes, crops, mirrors and distorts at random, as mmsegmentation does.

    Distortion is here and not on the device, because OpenCV's rounding to 8
    bits is part of it.
    """
    size = self._draw_size(decoded.labels.shape, rng)
    side = self.data.image_size
    window = draw_crop(
      decoded.labels, size, side, self.config.max_class_share, rng
    )
    image = resize_image(decoded.image, size, window)
    labels = resize_labels(decoded.labels, size, window)
    if rng.random() < self.data.flip_probability:
      image, labels = image[:, ::-1], labels[:, ::-1]
    distortion = draw_distortion(rng, self.config.distortion_probability)
    padded = np.zeros((side, side, 3), np.uint8)
    padded[: window.height, : window.width] = distort(image, distortion)
    return {
      "image": padded,
      "label": _padded(labels, (side, side)),
      "size": np.array(labels.shape, np.int32),
    }

  def evaluate(self, decoded: SegmentedImage) -> dict[str, np.ndarray]:
    """Resizes the image to each view.

    Raises:
      ValueError: the image has not the group's shapes.
    """
    size = decoded.labels.shape[0], decoded.labels.shape[1]
    shapes = self.shapes or self._shapes(size)
    if self._views(size) != shapes.views or not _fits(size, shapes.label):
      raise ValueError("has another size than its header said at the start")
    return {
      **{
        f"image_{i}": resize_image(decoded.image, view)
        for i, view in enumerate(shapes.views)
      },
      "label": _padded(decoded.labels, shapes.label),
      "size": np.array(size, np.int32),
    }

  def blank(self, *, train: bool) -> dict[str, np.ndarray]:
    """Returns a black image whose pixels have no class."""
    side = self.data.image_size
    if train:
      images, label = {"image": (side, side)}, (side, side)
    else:
      views, label = self.shapes or self._shapes((side, side))
      images = {f"image_{i}": view for i, view in enumerate(views)}
    return {
      **{name: np.zeros((*size, 3), np.uint8) for name, size in images.items()},
      "label": np.full(label, IGNORED, np.int16),
      "size": np.array(label, np.int32),
    }

  def groups(self, source: Source) -> list[Group]:
    """Sorts records by the sizes of their views, the largest first.

    So a lack of memory shows at once. A label map is padded to less than four
    times its pixels. A record whose size cannot be read joins the first group.
    When it is read there, it counts as unreadable.
    """
    assert isinstance(source, SegmentedSource)
    indices: dict[_Key, list[int]] = {}
    label: dict[_Key, tuple[int, int]] = {}
    unreadable = []
    for index in range(len(source)):
      try:
        size = source.image_size(index)
        key = _Key(self._views(size), _power_of_four(size))
      except Exception:  # Nearly any, as when decoding.
        unreadable.append(index)
        continue
      indices.setdefault(key, []).append(index)
      height, width = label.get(key, size)
      label[key] = max(height, size[0]), max(width, size[1])
    if not indices:
      side = self.data.image_size
      views, label_size = self._shapes((side, side))
      key = _Key(views, _power_of_four(label_size))
      indices[key], label[key] = [], label_size
    order = sorted(indices, key=lambda key: (-_pixels(key.views), *key))
    indices[order[0]] += unreadable
    return [
      Group(
        dataclasses.replace(self, shapes=Shapes(key.views, label[key])),
        np.sort(np.array(indices[key], np.int64)),
      )
      for key in order
    ]

  def _draw_size(
    self, size: tuple[int, ...], rng: np.random.Generator
  ) -> tuple[int, int]:
    ratio = rng.uniform(*self.config.box_ratio)
    long, short = (max(1, int(side * ratio)) for side in self.config.box)
    return rescaled_size((size[0], size[1]), (long, short))

  def _views(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    long, short = self.config.box
    return tuple(
      rescaled_size(size, (round(long * ratio), round(short * ratio)))
      for ratio in self.config.test_ratios
    )

  def _shapes(self, size: tuple[int, int]) -> Shapes:
    return Shapes(self._views(size), size)


class _Key(NamedTuple):
  """What the records of a group have in common.

  Attributes:
    views: heights and widths of the resized image.
    power: power of four, at most the number of the label map's pixels.
  """

  views: tuple[tuple[int, int], ...]
  power: int


def _power_of_four(size: tuple[int, int]) -> int:
  return ((size[0] * size[1]).bit_length() - 1) // 2


def draw_crop(
  labels: np.ndarray,
  size: tuple[int, int],
  side: int,
  max_class_share: float,
  rng: np.random.Generator,
) -> Window:
  """Draws a crop of a resized image (mmsegmentation 1.2.2, `RandomCrop`).

  Args:
    labels: the label map before resizing, [H, W].
    size: height and width of the resized image, in pixels.
    side: height and width of the crop; an image that is smaller keeps its own.
    max_class_share: a crop is drawn again, at most 10 times, unless it has two
      classes and each has a smaller share of the labelled pixels.
    rng: random generator.

  Returns:
    The crop; the last one drawn, if none is accepted.
  """
  window = _draw_window(size, side, rng)
  if max_class_share >= 1:
    return window
  for _ in range(_REDRAWS):
    if _is_varied(resize_labels(labels, size, window), max_class_share):
      break
    window = _draw_window(size, side, rng)
  return window


def _draw_window(
  size: tuple[int, int], side: int, rng: np.random.Generator
) -> Window:
  height, width = min(side, size[0]), min(side, size[1])
  top = int(rng.integers(size[0] - height + 1))
  left = int(rng.integers(size[1] - width + 1))
  return Window(top, left, height, width)


def _is_varied(labels: np.ndarray, max_class_share: float) -> bool:
  counts = np.bincount(labels[labels != IGNORED])
  is_alone = np.count_nonzero(counts) < 2
  return not is_alone and bool(counts.max() < max_class_share * counts.sum())


def _padded(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  padded = np.full(size, IGNORED, np.int16)
  padded[: labels.shape[0], : labels.shape[1]] = labels
  return padded


def _fits(size: tuple[int, int], into: tuple[int, int]) -> bool:
  return size[0] <= into[0] and size[1] <= into[1]


def _pixels(views: tuple[tuple[int, int], ...]) -> int:
  return sum(height * width for height, width in views)
