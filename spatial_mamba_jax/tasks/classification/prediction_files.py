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
# Most confusions in the list below a matrix without counts.
_LISTED_CONFUSIONS = 8


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
  """Draws the confusion matrix as shares of each true class.

  The cells have their numbers of images where there is room. Otherwise the most
  frequent confusions are listed below.
  """
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
  # As high as the matrix.
  bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
  bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
  bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  bar.ax.tick_params(labelsize=9)
  bar.set_label("share of the true class's images")
  axes.set_title(_title(predictions, weights), fontsize=11, parse_math=False)
  axes.set_xlabel("predicted class")
  axes.set_ylabel("true class")
  if num_classes <= _NAMED_CLASSES:
    _name_classes(axes, classes)
  else:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
  if num_classes <= _COUNTED_CLASSES:
    _write_counts(axes, image, counts, shares)
  elif lines := _frequent_confusions(counts, images, classes):
    figure.set_figheight(figure.get_figheight() + 0.18 * len(lines))
    text = "\n".join(lines)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=9, parse_math=False)
  return figure


def _title(predictions: Predictions, weights: str) -> str:
  values = predictions.evaluation().values
  title = (
    f"{weights}: top-1 {100 * values['top1']:.2f}% of"
    f" {values['images']:,} images"
  )
  if values["undecided"]:
    title += f", {values['undecided']:,} undecided (not shown)"
  return title


def _write_counts(
  axes: Any, image: Any, counts: np.ndarray, shares: np.ndarray
) -> None:
  """Writes the number of images into each cell, in black or white."""
  num_classes = len(counts)
  edges = np.arange(num_classes - 1) + 0.5
  for draw_lines in (axes.hlines, axes.vlines):
    draw_lines(edges, -0.5, num_classes - 0.5, color="0.9", linewidth=0.5)
  for row, column in np.argwhere(counts):
    red, green, blue, _ = image.cmap(image.norm(shares[row, column]))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    axes.text(
      column,
      row,
      f"{counts[row, column]:,}",
      ha="center",
      va="center",
      fontsize=10 if num_classes <= 10 else 8,
      # The luminance at which black and white have the same contrast.
      color="white" if luminance < 0.18 else "black",
    )


def _frequent_confusions(
  counts: np.ndarray, images: np.ndarray, classes: Sequence[str]
) -> list[str]:
  """Returns lines about the largest numbers beside the diagonal."""
  wrong = counts * (1 - np.eye(len(counts), dtype=int))
  order = np.argsort(-wrong, axis=None, kind="stable")[:_LISTED_CONFUSIONS]
  pairs = [divmod(int(place), len(counts)) for place in order]
  names = [_shortened(name) for name in classes]
  if len(names) > _NAMED_CLASSES:  # The axes have the labels.
    names = [f"{label} ({name})" for label, name in enumerate(names)]
  lines = [
    f"{names[true]} \N{RIGHTWARDS ARROW} {names[predicted]}:"
    f" {wrong[true, predicted]:,} of {images[true]:,} images"
    for true, predicted in pairs
    if wrong[true, predicted]
  ]
  title = "Most frequent confusions, true class \N{RIGHTWARDS ARROW} predicted:"
  return [title, *lines] if lines else []


def _shortened(name: str) -> str:
  # A directory's name may not be UTF-8.
  name = name.encode(errors="replace").decode()
  # The ends of similar names differ more often than their middles.
  if len(name) > 20:
    name = f"{name[:10]}\N{HORIZONTAL ELLIPSIS}{name[-9:]}"
  return name


def _name_classes(axes: Any, classes: Sequence[str]) -> None:
  names = [_shortened(name) for name in classes]
  is_wide = sum(map(len, names)) > 60
  for axis, rotation in ((axes.xaxis, 90 if is_wide else 0), (axes.yaxis, 0)):
    # A dollar sign in a name starts no formula.
    axis.set_ticks(
      range(len(classes)),
      names,
      fontsize=9 if len(classes) <= _COUNTED_CLASSES else 6,
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
