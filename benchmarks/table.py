"""Prints the tables of a device for `docs/measurements.md`.

    python -m benchmarks.table FILE

FILE was written by `benchmarks.device`.
"""

import argparse
import json
import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any


def main() -> None:
  """Prints the tables in Markdown."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.table")
  parser.add_argument("file", type=pathlib.Path)
  file = parser.parse_args().file
  try:
    record = json.loads(file.read_text())
    lines = [*networks(record), "", *operators(record["operators"])]
  except (OSError, ValueError, KeyError, TypeError) as error:
    parser.error(f"{file} is not what benchmarks.device writes: {error!r}")
  print(*lines, sep="\n")


def networks(record: dict[str, Any]) -> Iterator[str]:
  """Yields the machine, the table of the networks, and remarks."""
  versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
  commit = record["commit"]
  yield (
    f"{record['device']}, {record['cores']} cores, {versions}, commit"
    f" {commit[:12]}{commit[40:]}, {record['date']}; copies"
    f" {record['copy_bytes_per_second'] / 1e12:.3g} TB/s, multiplies"
    f" {record['matmul_flops'] / 1e12:.3g} TFLOP/s in {record['dtype']}"
    f" (`{record['command'].strip()}`)."
  )
  yield ""
  yield from _networks(record)
  yield ""
  yield from _remarks(record)


def _networks(record):
  yield (
    f"| network, {record['dtype']} | images/s | of the matmul rate"
    " | planned memory, GiB | kernels |"
  )
  yield "| --- | --- | --- | --- | --- |"
  for row in record["networks"]:
    name = row["model"].removeprefix("spatial_mamba_")
    yield (
      f"| {name} at {row['size']}, batch {row['batch_size']},"
      f" {row['program']}, {row['implementation']}"
      f" | {_digits(row['images_per_second'])} | {row['matmul_share']:.3f}"
      f" | {row['peak_bytes'] / 2**30:.2f} | {row['kernels']} |"
    )
  # Records from before this section have no such rows.
  for row in record.get("segmentors", ()):
    name = row["model"].removeprefix("spatial_mamba_")
    height, width = row["shape"]
    yield (
      f"| UPerNet on {name} at {height} x {width}, batch {row['batch_size']},"
      f" {row['program']}"
      f" | {_digits(row['images_per_second'])} | {row['matmul_share']:.3f}"
      f" | {row['peak_bytes'] / 2**30:.2f} | |"
    )
  for row in record["peers"]:
    yield (
      f"| {row['model']} at 224, batch {row['batch_size']}, {row['program']},"
      f" torch {row['torch']}, timm {row['timm']}"
      f" | {_digits(row['images_per_second'])} | | | |"
    )


def _remarks(record):
  spreads = [
    x["spread"]
    for row in (
      *record["networks"],
      *record.get("segmentors", ()),
      *record["peers"],
      *record["operators"],
    )
    for x in ([row] if "spread" in row else [row["forward"], row["backward"]])
  ]
  if spreads:
    yield (
      "The same program timed twice differed by"
      f" {100 * statistics.median(spreads):.1f}% in the median, by"
      f" {100 * max(spreads):.1f}% at most."
    )
  if record["left_out"]:
    yield f"Left out: {', '.join(record['left_out'])}."
  if record["failed"]:
    yield f"Failed: {', '.join(record['failed'])}."


def operators(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Yields a line for each operator, precision and batch size.

  A cell lists the stages. The default is compared with XLA's form, which is the
  associative one for a scan.
  """
  of = {(*_case(row), row["implementation"], _stage(row)): row for row in rows}
  stages = sorted({_stage(row) for row in rows}, reverse=True)

  def figures(case, direction, stage):
    default, associative, xla = (
      of.get((*case, name, stage), {}).get(direction)
      for name in ("default", "associative", "XLA")
    )
    rival = associative or xla
    if not (default and rival):
      return "-", "-", "-", "-"
    return (
      str(default["kernels"]),
      f"{1e6 * default['seconds']:,.0f}",
      f"{default['copy_share']:.2f}",
      f"{rival['seconds'] / default['seconds']:.1f}",
    )

  columns = " | ".join(
    f"{direction}: kernels | us | of the copy rate | times as fast as XLA's"
    for direction in ("forward", "backward")
  )
  sizes = ", ".join(f"{width} x {width} x {dim}" for width, dim in stages)
  yield f"| operator, at {sizes} | {columns} | error |"
  yield "| " + " | ".join(["---"] * 10) + " |"
  for case in dict.fromkeys(map(_case, rows)):
    cells = [
      ", ".join(column)
      for direction in ("forward", "backward")
      for column in zip(
        *(figures(case, direction, stage) for stage in stages), strict=True
      )
    ]
    checked = [row for row in rows if _case(row) == case]
    yield f"| {', '.join(case)} | {' | '.join(cells)} | {_error(checked)} |"


def _error(rows):
  """Returns the default's largest error, and the implementations in error."""
  errors = [
    error
    for row in rows
    if row["implementation"] == "default"
    for error in row["errors"].values()
  ]
  # NaN counts as the largest.
  greatest = max(errors, key=lambda x: (x != x, x), default=math.nan)
  wrong = {row["implementation"] for row in rows if not row["ok"]}
  return " ".join([f"{greatest:.0e}", *(f"**{x} is wrong**" for x in wrong)])


def _case(row):
  return row["op"], row["dtype"], f"batch {row['shape'][0]}"


def _stage(row):
  return row["shape"][2], row["shape"][3]


def _digits(x):
  """Formats three digits, or all digits before the point."""
  return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


if __name__ == "__main__":
  main()
