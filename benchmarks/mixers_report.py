"""Tables and figures of what `benchmarks.mixers` measured."""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks import figures
from benchmarks.mixer_programs import KINDS

Record = dict[str, Any]

# The palette of Okabe and Ito, which people with colour blindness can tell
# apart; line styles tell the two halves of the mixers apart.
_COLOURS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def tables(record: Record) -> Iterator[str]:
  """Yields the lines of Markdown tables."""
  yield f"`{record['command']}`"
  if "cost" in record or "accuracy" in record:
    yield from _overview(record)
  for name in ("inference", "train"):
    if "speed" in record:
      yield from _speed(record, name)
  for target in _targets(record):
    yield from _bytes(record, target)


def _overview(record):
  cost, accuracy = record.get("cost", {}), record.get("accuracy", {})
  yield ""
  yield (
    f"| mixer | parameters | MFLOP at 224 | {' | '.join(KINDS.values())} |"
    " top-1 of each seed | mean | spread |"
  )
  yield "| --- |" + " --- |" * 8
  for name in dict.fromkeys((*cost, *accuracy)):
    cells = ["-"] * 8
    for row in cost.get(name, ()):
      moves = row["moves"]
      cells[:5] = [
        f"{row['parameters']:,}",
        f"{row['flops_of_224'] / 1e6:.1f}",
        *(f"{moves[kind]:.1f}" for kind in KINDS.values()),
      ]
    scores = [row["top1"] for row in accuracy.get(name, ())]
    if scores:
      cells[5:] = [
        ", ".join(f"{score:.2%}" for score in scores),
        f"{statistics.mean(scores):.2%}",
        f"{max(scores) - min(scores):.2%}",
      ]
    yield f"| {name} | {' | '.join(cells)} |"


def _speed(record, program):
  rows = _of_sizes(record["speed"], lambda row: row["program"] == program)
  sizes = list(dict.fromkeys(size for of in rows.values() for size in of))
  yield ""
  yield (
    f"{program}, {record['speed_machine']['device']}: images/s (share of the"
    " matmul rate; MB; s to compile)"
  )
  yield ""
  yield f"| mixer | {' | '.join(f'{size}²' for size in sizes)} |"
  yield "| --- |" + " --- |" * len(sizes)
  for name, of in rows.items():
    cells = [
      f"{of[size]['images_per_second']:.3g} ({of[size]['matmul_share']:.2f};"
      f" {of[size]['peak_bytes'] / 1e6:.0f}; {of[size]['compile_seconds']:.0f})"
      if size in of
      else "-"
      for size in sizes
    ]
    yield f"| {name} | {' | '.join(cells)} |"


def _bytes(record, target):
  rows = _of_sizes(record["bytes"], lambda row: row["target"] == target)
  sizes = list(dict.fromkeys(size for of in rows.values() for size in of))
  yield ""
  yield f"Inference compiled for {target}: MB an image (launches)"
  yield ""
  yield f"| mixer | {' | '.join(f'{size}²' for size in sizes)} |"
  yield "| --- |" + " --- |" * len(sizes)
  for name, of in rows.items():
    cells = [
      f"{of[size]['bytes'] / 1e6:.3g} ({of[size]['launches']:,})"
      if size in of
      else "-"
      for size in sizes
    ]
    yield f"| {name} | {' | '.join(cells)} |"


def _of_sizes(section, is_wanted):
  """Returns {mixer: {size: row}}."""
  return {
    name: {row["size"]: row for row in rows if is_wanted(row)}
    for name, rows in section.items()
  }


def _targets(record):
  rows = (row for rows in record.get("bytes", {}).values() for row in rows)
  return list(dict.fromkeys(row["target"] for row in rows))


def pictures(record: Record) -> dict[str, bytes]:
  """Returns {suffix: file} of the figure, as PNG and SVG; none without speeds.

  Its panels show the images a second against the size of the images.
  """
  if "speed" not in record:
    return {}
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 4.2), layout="constrained")
  figure.suptitle(
    f"One network, one mixer or another, {record['speed_machine']['device']}",
    fontsize=11,
  )
  for axes, program in zip(
    figure.subplots(1, 2), ("inference", "train"), strict=True
  ):
    _draw(axes, record["speed"], program)
    axes.set_title(f"{program}, images a second", fontsize=10)
  figure.axes[0].legend(fontsize=8, frameon=False)
  return figures.files(figure, "mixers")


def _draw(axes, section, program):
  rows = _of_sizes(section, lambda row: row["program"] == program)
  for i, (name, of) in enumerate(rows.items()):
    axes.loglog(
      list(of),
      [row["images_per_second"] for row in of.values()],
      "-" if i < len(_COLOURS) else "--",
      color=_COLOURS[i % len(_COLOURS)],
      marker="o",
      markersize=3,
      linewidth=1.2,
      label=name,
    )
  sizes = sorted({size for of in rows.values() for size in of})
  axes.set_xticks(sizes, list(map(str, sizes)))
  axes.minorticks_off()
  axes.set_xlabel("pixels a side", fontsize=9)
  figures.bare(axes)
