"""The README's tables of a device: `python -m benchmarks.table FILE`.

FILE is what `benchmarks.device` wrote.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any


def main() -> None:
  """Prints Markdown."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.table")
  parser.add_argument("file", type=pathlib.Path)
  file = parser.parse_args().file
  try:
    record = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    parser.error(f"{file} is not what benchmarks.device wrote: {error}")
  print(*lines(record), sep="\n")


def lines(record: dict[str, Any]) -> Iterator[str]:
  """The lines of the tables."""
  versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
  yield (
    f"{record['device']}, {versions}, commit {record['commit'][:12]},"
    f" {record['date']}; copies {record['copy_bytes_per_second'] / 1e12:.2f}"
    f" TB/s, multiplies {record['matmul_flops'] / 1e12:.0f} TFLOP/s in bfloat16"
    f" (`{record['command'].strip()}`)."
  )
  yield ""
  yield from _networks(record["networks"])
  yield from _peers(record["peers"])
  yield ""
  yield from _operators(record["operators"])
  spreads = [
    x["spread"]
    for row in (*record["networks"], *record["peers"], *record["operators"])
    for x in ([row] if "spread" in row else [row["forward"], row["backward"]])
  ]
  if spreads:
    yield ""
    yield (
      "The same program timed twice differed by"
      f" {100 * sorted(spreads)[len(spreads) // 2]:.1f}% in the median, by"
      f" {100 * max(spreads):.1f}% at most."
    )
  if record["left_out"]:
    yield f"Left out for want of time: {', '.join(record['left_out'])}."
  if record["failed"]:
    yield f"Failed: {', '.join(record['failed'])}."


def _networks(rows):
  yield (
    "| network, bfloat16 | images/s | of the matmul rate | peak memory, GiB |"
  )
  yield "| --- | --- | --- | --- |"
  for row in rows:
    name = row["model"].removeprefix("spatial_mamba_")
    yield (
      f"| {name} at {row['size']}, batch {row['batch_size']},"
      f" {row['program']}, {row['implementation']}"
      f" | {row['images_per_second']:,.0f} | {row['matmul_share']:.3f}"
      f" | {row['peak_bytes'] / 2**30:.2f} |"
    )


def _peers(rows):
  for row in rows:
    yield (
      f"| {row['model']} at 224, batch {row['batch_size']}, {row['program']},"
      f" torch {row['torch']}, timm {row['timm']}"
      f" | {row['images_per_second']:,.0f} | | |"
    )


def _operators(rows):
  yield (
    "| operator | implementation | forward, us | of the copy rate"
    " | backward, us | of the copy rate | error |"
  )
  yield "| --- | --- | --- | --- | --- | --- | --- |"

  def case(row):
    return row["op"], row["shape"], row["dtype"]

  for (op, shape, dtype), group in itertools.groupby(rows, case):
    for row in group:
      numbers = " | ".join(
        f"{1e6 * row[direction]['seconds']:,.0f}"
        f" | {row[direction]['copy_share']:.2f}"
        for direction in ("forward", "backward")
      )
      size = " x ".join(map(str, shape))
      yield (
        f"| {op} {size} {dtype} | {row['implementation']} | {numbers}"
        f" | {row['error']:.0e} |"
      )


if __name__ == "__main__":
  main()
