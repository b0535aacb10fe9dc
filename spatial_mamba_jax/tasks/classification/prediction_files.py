"""Writes predictions: tables of images and classes, and a confusion matrix.

This is a module of its own, because it needs matplotlib.
"""

import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from spatial_mamba_jax.data import LabelledSource
from spatial_mamba_jax.tasks.classification.evaluation import Predictions
from spatial_mamba_jax.tasks.tables import write_csv

# Most classes for which names, and counts, are legible in the figure.
_NAMED_CLASSES = 50
_COUNTED_CLASSES = 20


def write_predictions(
  directory: pathlib.Path,
  predictions: Predictions,
  source: LabelledSource,
) -> None:
  """Writes three files into an existing directory.

  `predictions.csv`: a line for each image in the source's order: `image`,
    `status` (`ok`; `undecided`, if no single class scores highest;
    `unreadable`), `label`, and the most probable classes with their
    probabilities, `predicted_1` and `probability_1` to 5. Undecided images
    count as wrong.
  `per_class.csv`: a line for each class: its label, name, number of images, and
    top-1 and top-5 accuracy, empty for a class without images.
  `confusion.png`: the confusion matrix, as shares of each true class.
  """
  names = [source.name(index) for index in range(len(source))]
  classes = source.classes
  rows = _image_rows(predictions, names, classes)
  write_csv(directory / "predictions.csv", rows)
  write_csv(directory / "per_class.csv", _class_rows(predictions, classes))
  figure = confusion_figure(predictions, classes, directory.name)
  with warnings.catch_warnings():
    # Matplotlib draws a box for a letter that its font lacks.
    warnings.filterwarnings("ignore", message="Glyph ")
    figure.savefig(directory / "confusion.png")


def confusion_figure(
  predictions: Predictions, classes: Sequence[str], weights: str
) -> Figure:
  """Draws the confusion matrix as shares of each true class."""
  num_classes = len(classes)
  counts = predictions.confusion(num_classes)
  images = np.bincount(predictions.label, minlength=num_classes)
  shares = counts / np.maximum(images, 1)[:, None]
  # At least two pixels a class, up to a resolution that keeps the file small.
  figure = Figure(
    figsize=(8, 7.2),
    dpi=min(max(150, num_classes / 3), 600),
    layout="compressed",
  )
  axes = figure.add_subplot()
  image = axes.imshow(
    np.ma.masked_equal(shares, 0),  # Zero is white, unlike rare confusions.
    cmap="magma_r",
    # Most confusions are rare, and would be invisible on a linear scale.
    norm=PowerNorm(1 / 3, 0, 1),
    interpolation="nearest",
  )
  bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
  bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
  bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  bar.set_label("share of the true class's images")
  values = predictions.evaluation().values
  title = (
    f"{weights}: top-1 {100 * values['top1']:.2f}% of {values['images']} images"
  )
  if values["undecided"]:
    title += f", {values['undecided']} undecided (not shown)"
  axes.set_title(title, parse_math=False)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("true class")
  if num_classes <= _NAMED_CLASSES:
    _name_classes(axes, classes)
  else:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
  if num_classes <= _COUNTED_CLASSES:
    for row, column in np.argwhere(counts):
      axes.text(
        column,
        row,
        str(counts[row, column]),
        ha="center",
        va="center",
        fontsize=8,
        color="white" if shares[row, column] > 0.2 else "black",
      )
  return figure


def _name_classes(axes: Any, classes: Sequence[str]) -> None:
  # A directory's name may not be UTF-8.
  names = [name.encode(errors="replace").decode() for name in classes]
  short = [
    name if len(name) <= 20 else f"{name[:19]}\N{HORIZONTAL ELLIPSIS}"
    for name in names
  ]
  is_wide = sum(map(len, short)) > 60
  for axis, rotation in ((axes.xaxis, 90 if is_wide else 0), (axes.yaxis, 0)):
    # A dollar sign in a name starts no formula.
    axis.set_ticks(
      range(len(classes)),
      short,
      fontsize=8 if len(classes) <= _COUNTED_CLASSES else 6,
      rotation=rotation,
      parse_math=False,
    )


def _image_rows(
  predictions: Predictions, names: Sequence[str], classes: Sequence[str]
) -> Iterable[Sequence[Any]]:
  tops = range(1, predictions.top_classes.shape[1] + 1)
  pairs = [(f"predicted_{i}", f"probability_{i}") for i in tops]
  yield ("image", "status", "label", *(name for pair in pairs for name in pair))
  rows = {index: row for row, index in enumerate(predictions.index)}
  for index, name in enumerate(names):
    if index not in rows:
      yield (name, "unreadable", *[""] * (1 + 2 * len(tops)))
      continue
    row = rows[index]
    likeliest = zip(
      predictions.top_classes[row],
      predictions.top_probabilities[row],
      strict=True,
    )
    yield (
      name,
      "ok" if predictions.predicted[row] >= 0 else "undecided",
      classes[predictions.label[row]],
      *(x for c, p in likeliest for x in (classes[c], p)),
    )


def _class_rows(
  predictions: Predictions, classes: Sequence[str]
) -> Iterable[Sequence[Any]]:
  yield ("label", "class", "images", "top1", "top5")
  images = np.bincount(predictions.label, minlength=len(classes))
  hits = [
    np.bincount(predictions.label[is_hit], minlength=len(classes))
    for is_hit in (predictions.in_top1, predictions.in_top5)
  ]
  for label, (name, count) in enumerate(zip(classes, images, strict=True)):
    shares = [hit[label] / count if count else "" for hit in hits]
    yield (label, name, count, *shares)
