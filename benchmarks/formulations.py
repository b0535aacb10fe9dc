"""Compares forms of the selective scan: `python -m benchmarks.formulations`.

It measures the library's default, its two forms without a kernel, a chunked
form, and, if PyTorch is installed, two forms in PyTorch (`scan_forms`). The
shapes are those of the tiny model's four stages, and one image of few channels
and 64 to 262,144 tokens. Each form runs forward, and forward with backward, in
float32 and bfloat16. `timing` has the protocol. Of each program it records:

- time, and time to compile;
- temporary memory, as the compiler plans it;
- bytes that the program moves, as `hlo` counts them, over the compulsory ones,
  which are those of its arguments and results;
- launches, where each iteration of a loop launches its body;
- the largest error against float64, relative to the greatest value of an array:
  of the states, and with the backward pass of the gradients too.

With `--target` it compiles the programs for a machine that is not there, and
records the same but for times and errors (needs `pip install ".[train,aot]"`).

It prints tables in Markdown. It writes a JSON file, by default into
`benchmarks/results`, and the figures beside it as PNG and SVG. It lists a
program that crashes its process as failed.
"""

import argparse
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from benchmarks import formulations_report, operators, processes, scan_programs
from benchmarks.device import RESULTS
from benchmarks.scan_programs import CHANNELS, FORMS, TORCH_FORMS, Case
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.provenance import is_installed

STAGES = ((49, 1024), (196, 512), (784, 256), (3136, 128))  # L, D
LENGTHS = tuple(4**power for power in range(3, 10))  # 64 to 262,144.
# Seconds without a message after which a program counts as hung.
PATIENCE_SECONDS = 600


def main() -> None:
  """Measures, prints and writes; exits with status 1 if anything failed."""
  arguments = _parse()
  record: dict[str, Any] = {"rows": [], "left_out": [], "failed": {}}
  groups = [FORMS]
  if is_installed("torch") and not arguments.target:
    groups.append(TORCH_FORMS)
  for forms in groups:
    left = list(cases(forms, arguments.batch_size, arguments.lengths))
    for kind, value in _messages(left, arguments.target):
      _add(record, kind, value)
      file = arguments.output or _file(record)
      write_whole(file, json.dumps(record, indent=1) + "\n")
  file = arguments.output or _file(record)
  for suffix, picture in formulations_report.pictures(record).items():
    write_whole(file.with_suffix(suffix), picture)
  print("\n".join(formulations_report.tables(record)))
  if record["failed"]:
    sys.exit(f"failed: {', '.join(record['failed'])}")


def cases(
  forms: Iterable[str], batch_size: int, lengths: Iterable[int]
) -> Iterator[Case]:
  """Yields the programs, of each form those of few tokens first."""
  shapes = [(batch_size, *stage) for stage in STAGES]
  shapes += [(1, length, CHANNELS) for length in sorted(lengths)]
  for dtype, shape, gradients, form in itertools.product(
    operators.DTYPES, shapes, (False, True), forms
  ):
    yield Case(form, shape, dtype, gradients)


def _messages(
  left: list[Case], target: str | None
) -> Iterator[tuple[str, Any]]:
  """Yields what processes send, in a new one after each that ends early."""
  is_described = False
  while left:
    work = (
      partial(scan_programs.describe, cases=tuple(left), target=target)
      if target
      else partial(scan_programs.measure, cases=tuple(left))
    )
    try:
      for kind, value in processes.messages(work, patience=PATIENCE_SECONDS):
        if kind == "refused":
          sys.exit(value)
        if kind == "end":
          left.pop(0)
        else:
          yield kind, value
          is_described = True
    except processes.EndedError as error:
      if not is_described:
        sys.exit(f"nothing can be measured: {error}")
      yield "failed", {str(left.pop(0)): str(error)}


def _add(record, kind, value):
  if kind == "machine":
    command = " ".join(["python -m benchmarks.formulations", *sys.argv[1:]])
    record |= {**value, "command": command}
  elif kind == "failed":
    record["failed"] |= value
  else:
    record["rows" if kind == "row" else kind].append(value)
  print(json.dumps({kind: value}), file=sys.stderr, flush=True)


def _file(record):
  kind = record["device"].partition(":")[0].lower().replace(" ", "-")
  return RESULTS / f"formulations-{kind}.json"


def _parse():
  parser = argparse.ArgumentParser(prog="python -m benchmarks.formulations")
  parser.add_argument(
    "--output",
    type=json_file,
    help="a JSON file; default: one in benchmarks/results, named by the device",
  )
  parser.add_argument(
    "--target",
    help="a machine that is not there: a TPU topology (v5e:2x2), or a GPU"
    " (H200); default: this one",
  )
  parser.add_argument(
    "--batch-size", type=positive, default=8, help="of the four stages"
  )
  parser.add_argument(
    "--lengths",
    type=positive,
    nargs="*",
    default=LENGTHS,
    help="tokens of the image of few channels",
  )
  return parser.parse_args()


def json_file(text: str) -> pathlib.Path:
  """Converts an argument: a JSON file in a directory that can be written."""
  file = pathlib.Path(text)
  if (
    file.suffix != ".json"
    or file.is_dir()
    or not os.access(file.parent, os.W_OK)
  ):
    raise argparse.ArgumentTypeError(
      f"give a file that ends in .json, in a directory that exists, not {text}"
    )
  return file


def positive(text: str) -> int:
  """Converts an argument: a number of at least 1."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"give a number of at least 1, not {text}")
  return int(text)


if __name__ == "__main__":
  main()
