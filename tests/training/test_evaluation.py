"""Evaluations of classification, against loops in double precision."""

import csv
import dataclasses
import itertools
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.colors import to_rgba
from PIL import Image

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.pure import PureModel, Weights
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.tasks.classification.evaluation import (
  Predictions,
  calibration_error,
)
from spatial_mamba_jax.tasks.classification.prediction_files import (
  confusion_figure,
  write_predictions,
)
from spatial_mamba_jax.training.config import TrainConfig
from spatial_mamba_jax.training.evaluation import evaluate
from spatial_mamba_jax.training.program import make_evaluator
from spatial_mamba_jax.training.sharding import make_mesh
from spatial_mamba_jax.training.step import make_eval_step

pytestmark = pytest.mark.usefixtures("strict")

SCALES = {"ema": 1.0, "raw": -2.0}


class Pixels(nnx.Module):
  """A model whose logits are an image's first values, times the weight."""

  def __init__(self, num_classes, *, rngs):
    self._num_classes = num_classes
    self.scale = nnx.Param(jnp.float32(1))

  def __call__(self, images):
    values = images.reshape(len(images), -1)[:, : self._num_classes]
    return values * self.scale[...]


@dataclasses.dataclass
class PixelsConfig(ClassificationConfig):
  """Classification by `Pixels`."""

  def create(self, *arguments, **options):
    task = super().create(*arguments, **options)
    task.network = partial(Pixels, self.num_classes)
    return task


class Noise:
  """Images of noise, some unreadable; there are none of the last class."""

  def __init__(self, count, num_classes, unreadable=()):
    self.num_classes = num_classes
    self.classes = [f"class {i}" for i in range(num_classes)]
    self.unreadable = unreadable
    rng = np.random.default_rng(0)
    self.pixels = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    self.labels = rng.integers(0, max(num_classes - 1, 1), count)

  def __len__(self):
    return len(self.pixels)

  def __getitem__(self, index):
    if index in self.unreadable:
      raise OSError("broken")
    return {"image": self.pixels[index], "label": int(self.labels[index])}

  def name(self, index):
    return f"image {index}, \u00e4.png"

  def logits(self, scale):
    """Computes the values in double precision, of the readable images."""
    readable = np.delete(np.arange(len(self)), self.unreadable)
    mean = np.array([0.485, 0.456, 0.406])
    std = np.array([0.229, 0.224, 0.225])
    values = (self.pixels[readable] / 255 - mean) / std
    flat = values.reshape(len(readable), -1)[:, : self.num_classes]
    return readable, scale * flat


def found_of(source, batch_size):
  config = TrainConfig(
    task=PixelsConfig(num_classes=source.num_classes),
    data=DataConfig(
      image_size=4, test_crop_ratio=1.0, max_unreadable_share=0.2
    ),
    evaluation_batch_size=batch_size,
  )
  return evaluate(
    make_evaluator(config, make_mesh(config.mesh)),
    {
      name: Weights({"scale": jnp.float32(scale)}, {})
      for name, scale in SCALES.items()
    },
    source,
  )


def reference_ece(confidence, correct):
  """Guo et al. 2017, section 2: bin m of 15 is ((m - 1) / 15, m / 15]."""
  error = 0.0
  for m in range(1, 16):
    inside = [i for i, c in enumerate(confidence) if (m - 1) / 15 < c <= m / 15]
    if inside:
      accuracy = sum(bool(correct[i]) for i in inside) / len(inside)
      mean = sum(float(confidence[i]) for i in inside) / len(inside)
      error += len(inside) / len(confidence) * abs(accuracy - mean)
  return error


def read(path):
  with path.open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


@pytest.mark.parametrize("num_classes", [1, 3, 10])
def test_values_equal_those_of_loops(num_classes):
  source = Noise(61, num_classes, unreadable=(7, 60))
  for name, found in found_of(source, 8).items():
    readable, logits = source.logits(SCALES[name])
    labels = source.labels[readable]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    guesses = logits.argmax(1)
    values, each = found.evaluation.values, found.meter.predictions()
    assert (values["images"], values["unreadable"]) == (59, 2)
    assert values["undecided"] == 0
    assert each.index.tolist() == readable.tolist()
    hits = sum(a == b for a, b in zip(guesses, labels, strict=True))
    assert values["top1"] == hits / 59
    above = (logits > logits[range(59), labels][:, None]).sum(1)
    assert values["top5"] == (above < 5).sum() / 59
    # Logits up to 5 have float32's error of some 1e-6.
    own = shares[range(59), labels]
    assert values["loss"] == pytest.approx(-np.log(own).mean(), abs=1e-5)
    expected = reference_ece(shares.max(1), guesses == labels)
    assert values["ece"] == pytest.approx(expected, abs=1e-5)
    confusion = np.zeros((num_classes, num_classes), int)
    for label, guess in zip(labels, guesses, strict=True):
      confusion[label, guess] += 1
    np.testing.assert_array_equal(each.confusion(num_classes), confusion)
    order = np.argsort(-logits, kind="stable")[:, :5]
    np.testing.assert_array_equal(each.top_classes, order)
    np.testing.assert_allclose(
      each.top_probabilities, np.take_along_axis(shares, order, 1), atol=1e-5
    )


def test_batches_and_padding_change_nothing():
  source = Noise(23, 6, unreadable=(0, 9))
  first, *others = (found_of(source, size) for size in (1, 4, 23, 50))
  for other, name in itertools.product(others, SCALES):
    assert other[name].evaluation == first[name].evaluation
    predictions = other[name].meter.predictions()
    for field, array in vars(first[name].meter.predictions()).items():
      np.testing.assert_array_equal(getattr(predictions, field), array, field)


def test_an_image_without_a_highest_score_is_wrong_and_counted():
  logits = np.array(
    [
      [3.0, 1.0, 2.0],  # label 0: right
      [3.0, 1.0, 2.0],  # label 2: second
      [1.0, 1.0, 0.0],  # label 0: a tie
      [np.nan, np.nan, np.nan],  # label 0
      [np.inf, 0.0, 0.0],  # label 0
      [2.0, np.nan, 1.0],  # label 0
    ]
  )

  class Fixed(Pixels):
    def __call__(self, images):
      return jnp.asarray(logits, jnp.float32)

  task = TrainConfig(task=ClassificationConfig(num_classes=3)).create_task()
  step = make_eval_step(task, PureModel(partial(Fixed, 3)))
  batch = {
    "image": jnp.zeros((6, 2, 2, 3), jnp.uint8),
    "label": jnp.asarray([0, 2, 0, 0, 0, 0]),
    "index": jnp.arange(6),
    "mask": jnp.ones(6, bool),
  }
  weights = Weights({"scale": jnp.float32(1)}, {})
  columns = jax.device_get(step(weights, batch))
  assert columns["predicted"].tolist() == [0, 0, -1, -1, -1, -1]

  def predictions(count):
    kept = {k: x[:count] for k, x in columns.items() if k != "mask"}
    return Predictions(**kept)

  evaluation = predictions(6).evaluation()
  values = evaluation.values
  assert values["top1"] == 1 / 6
  assert values["top5"] == 3 / 6  # Of three classes, but not of NaN.
  assert values["undecided"] == 4
  assert np.isnan(values["loss"])
  assert np.isnan(values["ece"])
  assert str(evaluation).endswith("images 6  undecided 4")
  assert evaluation.to_json()["loss"] is None
  assert predictions(6).confusion(3).tolist() == [[1, 0, 0], [0] * 3, [1, 0, 0]]
  values = predictions(3).evaluation().values
  shares = np.exp(logits[:3]) / np.exp(logits[:3]).sum(1, keepdims=True)
  loss = -np.log(shares[range(3), [0, 2, 0]]).mean()
  assert values["loss"] == pytest.approx(loss, rel=1e-6)
  assert values["ece"] == pytest.approx(
    reference_ece(shares.max(1), [True, False, False]), rel=1e-6
  )
  assert values["undecided"] == 1


def test_calibration_error_at_the_edges_of_bins():
  rng = np.random.default_rng(0)
  edges = np.arange(1, 16) / 15
  near = np.concatenate([edges, np.nextafter(edges, 0), [1e-9]])
  correct = rng.random(len(near)) < 0.5
  assert calibration_error(near, correct) == pytest.approx(
    reference_ece(near, correct), abs=1e-12
  )
  assert calibration_error(np.ones(4), np.ones(4, bool)) == 0
  assert calibration_error(np.ones(4), np.zeros(4, bool)) == 1
  assert calibration_error(np.array([]), np.array([], bool)) == 0


def test_files(tmp_path):
  source = Noise(61, 6, unreadable=(7, 60))
  found = found_of(source, 8)
  for name, scale in SCALES.items():
    predictions = found[name].meter.predictions()
    (tmp_path / name).mkdir()
    found[name].meter.write(tmp_path / name)
    readable, logits = source.logits(scale)
    guesses = dict(zip(readable.tolist(), logits.argmax(1), strict=True))
    rows = read(tmp_path / name / "predictions.csv")
    assert [row["image"] for row in rows] == [source.name(i) for i in range(61)]
    for index, row in enumerate(rows):
      if index in source.unreadable:
        assert row.pop("status") == "unreadable"
        assert row.pop("image") == source.name(index)
        assert not any(row.values())
        continue
      assert row["status"] == "ok"
      assert row["label"] == f"class {source.labels[index]}"
      assert row["predicted_1"] == f"class {guesses[index]}"
      place = predictions.index.tolist().index(index)
      for m in range(5):
        number = np.float32(row[f"probability_{m + 1}"])
        assert number == predictions.top_probabilities[place, m]
    rows = read(tmp_path / name / "per_class.csv")
    assert [row["class"] for row in rows] == source.classes
    for label, row in enumerate(rows):
      own = readable[source.labels[readable] == label]
      assert (int(row["label"]), int(row["images"])) == (label, len(own))
      if len(own):
        hits = sum(guesses[i] == label for i in own.tolist())
        assert float(row["top1"]) == hits / len(own)
      else:
        assert (label, row["top1"], row["top5"]) == (5, "", "")
    with Image.open(tmp_path / name / "confusion.png") as image:
      assert image.format == "PNG"
      assert min(image.size) > 900


def luminance(colour):
  """The relative luminance of sRGB, by WCAG."""
  linear = [
    x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
    for x in colour[:3]
  ]
  return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("num_classes", [1, 20, 1000])
def test_the_confusion_matrix_is_legible(num_classes, tmp_path):
  label = np.repeat(np.arange(num_classes), 2)
  predicted = label.copy()
  predicted[2 * (num_classes // 4)] = num_classes // 2
  predictions = Predictions(
    index=np.arange(len(label)),
    label=label,
    predicted=predicted,
    rank=(label != predicted).astype(int),
    loss=np.ones(len(label)),
    top_classes=predicted[:, None],
    top_probabilities=np.ones((len(label), 1)),
  )
  # Neither a formula, nor in the font, nor UTF-8.
  classes = ["$x_$", "\u6570\u5b57", "\udcff", *map(str, range(num_classes))]
  figure = confusion_figure(predictions, classes[:num_classes], "raw")
  axes = figure.axes[0]
  (image,) = axes.get_images()
  shares = np.ma.filled(image.get_array(), 0)
  expected = np.eye(num_classes)
  if num_classes > 1:
    expected[num_classes // 4, [num_classes // 4, num_classes // 2]] = 0.5
  np.testing.assert_array_equal(shares, expected)
  assert (axes.get_xlabel(), axes.get_ylabel()) == (
    "predicted class",
    "true class",
  )
  for axis in (axes.xaxis, axes.yaxis):
    assert len(axis.get_ticklabels()) <= 20
  # Each number has a contrast of at least 4.5 with its cell.
  for text in axes.texts:
    cell = image.cmap(
      image.norm(shares[tuple(map(int, text.get_position()[::-1]))])
    )
    pair = [luminance(x) for x in (cell, to_rgba(text.get_color()))]
    assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5
  assert len(axes.texts) == {1: 1, 20: 21, 1000: 0}[num_classes]
  listed = figure.get_supxlabel()
  assert ("250 (247) \u2192 500 (497): 1 of 2" in listed) == (num_classes > 20)
  source = Noise(len(label), num_classes)
  source.classes = classes[:num_classes]
  (tmp_path / "raw").mkdir()
  write_predictions(tmp_path / "raw", predictions, source)
  with warnings.catch_warnings(action="ignore"):
    figure.draw_without_rendering()
  x, y = axes.transData.transform((num_classes // 2, num_classes // 4))
  with Image.open(tmp_path / "raw" / "confusion.png") as file:
    pixels = np.asarray(file.convert("L"))[::-1]
  # The one confusion can be seen, beside its number where it has one.
  x, y = round(x), round(y)
  assert pixels[y - 1 : y + 2, x - 6 : x + 7].min() < 150
