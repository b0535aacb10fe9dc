"""Mean IoU, against mmsegmentation's numbers and loops over pixels."""

import itertools

import numpy as np
import pytest

from spatial_mamba_jax.data.digit_scenes import DigitScenes
from spatial_mamba_jax.data.label_maps import IGNORED
from spatial_mamba_jax.tasks.base import Meter, PictureMeter
from spatial_mamba_jax.tasks.segmentation.evaluation import SegmentationMeter
from spatial_mamba_jax.tasks.segmentation.panels import COLUMNS, PANELS, SCORE


class Classes(DigitScenes):
  """A source of some number of classes; its images are not used."""

  def __init__(self, num_classes):
    super().__init__("validation")
    object.__setattr__(self, "count", num_classes)

  @property
  def num_classes(self):
    return self.count


def columns_of(maps, indices=None):
  """Pads (prediction, label) pairs to one shape, as a batch of the task.

  Beyond an image the prediction is class 0, which must not count.
  """
  sizes = np.array([label.shape for _, label in maps], np.int32)
  shape = (len(maps), *sizes.max(axis=0))
  predicted = np.zeros(shape, np.int16)
  labels = np.full(shape, IGNORED, np.int16)
  for i, (prediction, label) in enumerate(maps):
    height, width = label.shape
    predicted[i, :height, :width] = prediction
    labels[i, :height, :width] = label
  index = np.arange(len(maps)) if indices is None else np.array(indices)
  return {
    "index": index.astype(np.int32),
    "predicted": predicted,
    "label": labels,
    "size": sizes,
  }


def meter_of(maps, num_classes, batch_size=None):
  meter = SegmentationMeter(Classes(num_classes))
  order = range(len(maps))
  step = batch_size or len(maps)
  for start in range(0, len(maps), step):
    chosen = order[start : start + step]
    meter.add(columns_of([maps[i] for i in chosen], chosen))
  return meter


def random_maps(rng, num_classes, count):
  """Maps of random sizes; a third of the predictions are right."""
  maps = []
  for _ in range(count):
    size = tuple(rng.integers(1, 9, 2))
    label = rng.integers(-1, num_classes, size)
    guess = rng.integers(0, num_classes, size)
    predicted = np.where((rng.random(size) < 0.3) & (label >= 0), label, guess)
    maps.append((predicted, label))
  return maps


def means_of(maps, num_classes):
  """Returns mIoU, mAcc, aAcc and the counts, by a loop over pixels."""
  both, predicted, labelled = np.zeros((3, num_classes), int)
  for prediction, label in maps:
    for p, t in zip(prediction.flat, label.flat, strict=True):
      if t != IGNORED:
        predicted[p] += 1
        labelled[t] += 1
        both[t] += p == t
  ious, accuracies = [], []
  for b, p, t in zip(both, predicted, labelled, strict=True):
    if p + t:
      ious.append(b / (p + t - b))
    if t:
      accuracies.append(b / t)
  total = both.sum() / labelled.sum()
  means = np.mean(ious), np.mean(accuracies), total
  return means, (both, predicted, labelled)


def test_equals_mmsegmentation(golden):
  arrays = golden("segmentation/iou")
  maps = []
  for i in range(2):
    label = arrays[f"iou_gt{i}"].astype(np.int16)
    label[label == 255] = IGNORED
    maps.append((arrays[f"iou_pred{i}"], label))
  meter = meter_of(maps, 8)
  counts, values = meter.counts, meter.result(0).values
  for name, actual in (
    ("intersect", counts.intersection),
    ("pred_area", counts.predicted),
    ("label_area", counts.labelled),
    ("union", counts.predicted + counts.labelled - counts.intersection),
    ("class", counts.iou.astype(np.float32)),
    ("acc_class", counts.accuracy.astype(np.float32)),
  ):
    np.testing.assert_array_equal(actual, arrays[f"iou_{name}"], name)
  # The means of float32's values differ by its rounding.
  for name, value in (
    ("mIoU", "miou"),
    ("mAcc", "mean_accuracy"),
    ("aAcc", "pixel_accuracy"),
  ):
    expected = float(arrays[f"iou_{name}"])
    assert values[value] == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 300])
def test_equals_a_loop_over_pixels(num_classes):
  maps = random_maps(np.random.default_rng(num_classes), num_classes, 12)
  expected, counts = means_of(maps, num_classes)
  for batch_size in (1, 5, 12):
    meter = meter_of(maps, num_classes, batch_size)
    for actual, count in zip(vars(meter.counts).values(), counts, strict=True):
      assert actual.dtype == np.int64
      np.testing.assert_array_equal(actual, count)
    evaluation = meter.result(3)
    assert evaluation.score == evaluation.values[SCORE]
    names = ("miou", "mean_accuracy", "pixel_accuracy")
    actual = [evaluation.values[name] for name in names]
    assert actual == pytest.approx(expected, rel=1e-14)
    assert evaluation.values["images"] == 12
    assert evaluation.values["unreadable"] == 3


def test_counts_are_exact_where_float32_is_not():
  """mmsegmentation's sums stay at 2**24."""
  side = 2**10
  large = {
    "predicted": np.zeros((1, side, side), np.int16),
    "label": np.zeros((1, side, side), np.int16),
    "size": np.array([[side, side]], np.int32),
  }
  meter = meter_of([], 2, 1)
  for index in range(16):
    meter.add({"index": np.array([index]), **large})
  for index in range(16, 19):
    meter.add(columns_of([(np.zeros((1, 1)), np.zeros((1, 1)))], [index]))
  for counts in vars(meter.counts).values():
    assert counts.tolist() == [2**24 + 3, 0]


def test_absent_classes():
  predicted = np.array([[0, 0, 1, 3]])
  label = np.array([[0, 2, IGNORED, IGNORED]])
  meter = meter_of([(predicted, label)], 4)
  # Class 1 and 3 are predicted only where there is no label.
  np.testing.assert_array_equal(meter.counts.iou, [0.5, np.nan, 0, np.nan])
  values = meter.result(0).values
  assert values["miou"] == 0.25
  # Class 1 is predicted and never labelled: it has an IoU, but no accuracy.
  label = np.array([[0, 2, 0, IGNORED]])
  meter = meter_of([(predicted, label)], 4)
  np.testing.assert_array_equal(meter.counts.iou, [1 / 3, 0, 0, np.nan])
  np.testing.assert_array_equal(meter.counts.accuracy, [0.5, np.nan, 0, np.nan])


def test_without_a_labelled_pixel():
  maps = [(np.zeros((2, 3)), np.full((2, 3), IGNORED))]
  for meter in (meter_of(maps, 3), meter_of([], 3, 1)):
    evaluation = meter.result(0)
    shares = {"miou": None, "mean_accuracy": None, "pixel_accuracy": None}
    counts = {"images": len(meter.maps), "unreadable": 0}
    assert evaluation.to_json() == shares | counts


def test_line_and_columns():
  maps = [(np.array([[0, 1, 1]]), np.array([[0, 1, 0]]))] * 1234
  meter = meter_of(maps, 2)
  line = "mIoU 50.00%, mAcc 75.00%, aAcc 66.67% (1,234 images"
  assert str(meter.result(0)) == f"{line})"
  assert str(meter.result(2)) == f"{line}, 2 unreadable)"
  values = meter.result(0).values
  drawn = [line for panel in PANELS for line in panel.lines]
  assert {line.value for line in drawn if line.kind != "train"} <= set(values)
  assert {column.value for column in COLUMNS} <= set(values)


def test_label_maps_are_kept_compressed():
  rng = np.random.default_rng(0)
  maps = random_maps(rng, 7, 5)
  order = (3, 0, 4, 1, 2)
  meter = SegmentationMeter(Classes(7))
  for i in order:
    meter.add(columns_of([maps[i]], [i]))
  assert list(meter.maps.indices) == list(range(5))
  for i, kind in itertools.product(range(5), range(2)):
    kept = meter.maps[i][kind]
    assert kept.dtype == np.int16
    np.testing.assert_array_equal(kept, maps[i][kind])
  scenes = DigitScenes("validation")
  # Twice the size, because edges take most of the bytes of small maps.
  labels = (scenes[0]["labels"] % 7).astype(np.int16).repeat(2, 0).repeat(2, 1)
  meter.add(columns_of([(labels, labels)], [9]))
  ((_, data),) = (meter.maps._packed[9],)
  assert len(data) < 2 * labels.nbytes / 20


def test_protocols():
  meter = SegmentationMeter(DigitScenes("validation"))
  assert isinstance(meter, Meter)
  assert isinstance(meter, PictureMeter)
