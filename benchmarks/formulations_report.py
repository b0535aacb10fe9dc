"""Tables and figures of what `benchmarks.formulations` measured."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks import figures
from benchmarks.scan_programs import CHANNELS

Row = dict[str, Any]

# Fewest tokens of a scan to which the growth is fitted. Of a shorter scan, the
# launch of the program takes much of the time.
FITTED_LENGTH = 4096
# The palette of Okabe and Ito, which people with colour blindness can tell
# apart, and markers for print in grey.
_STYLES = {
  "default": ("black", "o"),
  "sequential": ("#0072B2", "s"),
  "associative": ("#D55E00", "^"),
  "chunked": ("#009E73", "D"),
  "PyTorch loop": ("#CC79A7", "v"),
  "PyTorch prefix": ("#E69F00", "P"),
}


def tables(record: dict[str, Any]) -> Iterator[str]:
  """Yields the lines of Markdown tables."""
  versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
  yield (
    f"{record['device']}, {record['cores']} cores, {versions}, commit"
    f" {record['commit'][:12]}{record['commit'][40:]}, {record['date']}"
    f" (`{record['command']}`)."
  )
  rows = record["rows"]
  if _is_timed(rows):
    yield from _summary(rows, "ms", lambda row: 1e3 * row["seconds"])
    yield from _growth(
      rows, "time", "seconds", lambda x, L: f"{1e9 * x / L:.3g} ns a token"
    )
  else:
    yield from _summary(rows, "bytes over compulsory ones", _traffic)
    yield from _growth(
      rows, "launches", "launches", lambda x, L: f"{x:,} for {L:,} tokens"
    )
  yield from _everything(rows)
  if record["left_out"]:
    yield ""
    yield "Left out, because fewer tokens took long to run or to compile:"
    yield from (f"- {_name(case)}" for case in record["left_out"])


def _summary(rows, unit, value):
  """A line for each shape, a column for each form, the least in bold."""
  forms = list(dict.fromkeys(row["form"] for row in rows))
  yield ""
  yield f"| {unit}, forward / with backward | {' | '.join(forms)} |"
  yield "| --- |" + " --- |" * len(forms)
  values = {
    (_shape(row), row["form"], row["gradients"]): value(row) for row in rows
  }
  for shape in dict.fromkeys(map(_shape, rows)):
    cells = [
      " / ".join(
        _cell(values, shape, form, forms, is_backward)
        for is_backward in (False, True)
      )
      for form in forms
    ]
    yield f"| {shape} | {' | '.join(cells)} |"


def _cell(values, shape, form, forms, gradients):
  value = values.get((shape, form, gradients))
  if value is None:
    return "-"
  rivals = (values.get((shape, x, gradients), math.inf) for x in forms)
  return f"**{value:.3g}**" if value == min(rivals) else f"{value:.3g}"


def _growth(rows, name, key, text):
  """The exponent of L, and the value for the longest scan."""
  yield ""
  yield f"| growth of {name} with L | forward | with backward |"
  yield "| --- | --- | --- |"
  for form, dtype in dict.fromkeys((x["form"], x["dtype"]) for x in rows):
    cells = []
    for gradients in (False, True):
      points = sorted(
        (row["shape"][1], row[key])
        for row in _sweep(rows, form, dtype, gradients)
        if row["shape"][1] >= FITTED_LENGTH
      )
      if len(points) < 3:
        cells.append("-")
        continue
      lengths, values = zip(*points, strict=True)
      exponent, _ = np.polyfit(np.log(lengths), np.log(values), 1)
      length, value = points[-1]
      cells.append(f"L^{exponent:.2f}, {text(value, length)}")
    yield f"| {form}, {dtype} | {' | '.join(cells)} |"


def _everything(rows):
  timed = _is_timed(rows)
  yield ""
  yield (
    "| form, B, L, D, precision |"
    + (" ms | spread | error |" if timed else "")
    + " temporary, MB | bytes / compulsory | launches | kernels | compile, s |"
  )
  yield "| --- |" + " --- |" * (8 if timed else 5)
  for row in rows:
    measured = (
      f" {1e3 * row['seconds']:.3g} | {row['spread']:.0%}"
      f" | {row['error']:.0e} |"
      if timed
      else ""
    )
    compiled = (
      f" {row['temporary_bytes'] / 1e6:.3g} | {_traffic(row):.2f}"
      f" | {row['launches']:,} | {row['kernels']}"
      f" | {row['compile_seconds']:.1f} |"
      if "launches" in row
      else " - | - | - | - | - |"
    )
    yield f"| {_name(row)} |{measured}{compiled}"


def pictures(record: dict[str, Any]) -> dict[str, bytes]:
  """Returns {suffix: file} of the figure, as PNG and SVG.

  Its panels show the time, or where nothing was timed bytes and launches, of
  the image of few channels against its tokens.
  """
  from matplotlib.figure import Figure

  rows = record["rows"]
  panels: tuple[tuple[str, bool, Callable[[Row], float]], ...] = (
    ("forward, ms", False, lambda row: 1e3 * row["seconds"]),
    ("forward and backward, ms", True, lambda row: 1e3 * row["seconds"]),
  )
  if not _is_timed(rows):
    panels = (
      ("forward and backward, bytes over compulsory", True, _traffic),
      ("forward and backward, launches", True, lambda row: row["launches"]),
    )
  figure = Figure(figsize=(9, 4.2), layout="constrained")
  figure.suptitle(
    f"The scan of one image with {CHANNELS} channels, {record['device']}",
    fontsize=11,
  )
  for axes, (title, gradients, value) in zip(
    figure.subplots(1, len(panels)), panels, strict=True
  ):
    _draw(axes, rows, gradients, value)
    axes.set_title(title, fontsize=10)
  figure.axes[0].legend(fontsize=8, frameon=False)
  return figures.files(figure, "formulations")


def _draw(axes, rows, gradients, value):
  for form, (colour, marker) in _STYLES.items():
    for dtype, line in (("float32", "-"), ("bfloat16", ":")):
      points = sorted(
        (row["shape"][1], value(row))
        for row in _sweep(rows, form, dtype, gradients)
      )
      if points:
        axes.loglog(
          *zip(*points, strict=True),
          line,
          color=colour,
          marker=marker,
          markersize=4,
          linewidth=1.2,
          label=form if dtype == "float32" else None,
        )
  axes.set_xlabel("L, tokens (solid: float32; dotted: bfloat16)", fontsize=9)
  figures.bare(axes)


def _sweep(rows, form, dtype, gradients):
  """The measurements of one form for the image of few channels."""
  wanted = form, dtype, gradients
  return [
    row
    for row in rows
    if row["shape"][2] == CHANNELS
    and (row["form"], row["dtype"], row["gradients"]) == wanted
  ]


def _is_timed(rows):
  return any("seconds" in row for row in rows)


def _traffic(row):
  return row["moved_bytes"] / row["compulsory_bytes"]


def _shape(row):
  return f"{', '.join(f'{x:,}' for x in row['shape'])}, {row['dtype']}"


def _name(row):
  direction = "with backward" if row["gradients"] else "forward"
  return f"{row['form']} {direction}, {_shape(row)}"
