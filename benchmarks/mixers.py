"""Compares all token mixers in one network: `python -m benchmarks.mixers`.

The network is Spatial-Mamba micro (--model selects another one for `cost` and
`speed`); only its mixer changes. --sections selects some of four sections:

- `cost`: parameters, FLOP of an image, and how many images a mixer's forward
  pass transposes, gathers or reverses (`mixer_programs` says how they are
  counted);
- `speed`: images a second of inference and of the training step, share of the
  rate of matrix products, time to compile and peak memory, for images of
  several sizes: 32 to 512 pixels a side, and 2048 where there is a GPU or TPU;
  `timing` has the protocol;
- `bytes`: bytes that inference moves for an image, in programs of Spatial-Mamba
  tiny compiled for an H200 and a v5e (needs `pip install ".[train,aot]"`);
- `accuracy`: top-1 on the digits with several seeds, as
  `configs/digits_mixers.py` trains them. The runs are kept in --workdir; the
  same command resumes them. One validation image is 0.34%.

It prints tables in Markdown, and writes a JSON file, by default into
`benchmarks/results`, and a figure beside it as PNG and SVG. What the file has
of other sections stays, and of other mixers, if they were measured with this
commit on such a machine.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import spatial_mamba_jax as smj
from benchmarks import machine, mixer_programs, mixers_report, processes
from benchmarks.device import RESULTS
from benchmarks.formulations import json_file, positive
from benchmarks.mixer_programs import SECTIONS
from spatial_mamba_jax.training.digests import write_whole

# Seconds without a message after which a program counts as hung.
PATIENCE_SECONDS = 1800


def main() -> None:
  """Measures, prints and writes; exits with status 1 if anything failed."""
  arguments = _parse()
  file = arguments.output
  record = _record(file)
  failed = []
  for section in arguments.sections:
    start(record, section)
    for name in arguments.mixers:
      rows = record[section][name] = []
      try:
        rows.extend(_rows(section, name, arguments))
      except processes.EndedError as error:
        failed.append(f"{section} of {name}: {error}")
      write_whole(file, json.dumps(record, indent=1) + "\n")
  for suffix, picture in mixers_report.pictures(record).items():
    write_whole(file.with_suffix(suffix), picture)
  print("\n".join(mixers_report.tables(record)))
  if failed:
    sys.exit(f"failed: {'; '.join(failed)}")


def _record(file: pathlib.Path) -> dict[str, Any]:
  command = " ".join(["python -m benchmarks.mixers", *sys.argv[1:]])
  old = json.loads(file.read_text()) if file.exists() else {}
  return {**old, "command": command}


def start(record: dict[str, Any], section: str) -> None:
  """Describes this machine in a record.

  Rows of another machine or another commit are dropped.
  """
  now = machine.describe()
  old = record.get(f"{section}_machine", {})
  if any(old.get(name) != now[name] for name in now.keys() - {"date"}):
    record[section] = {}
  record[f"{section}_machine"] = now


def _rows(section, name, arguments) -> Iterator[dict[str, Any]]:
  """Yields the measurements of one mixer, made in a process of its own."""
  work = partial(
    SECTIONS[section],
    mixer=name,
    model=arguments.model,
    batch_size=arguments.batch_size,
    sizes=arguments.sizes,
    seeds=tuple(arguments.seeds),
    workdir=arguments.workdir.absolute(),
  )
  for row in processes.messages(work, patience=PATIENCE_SECONDS):
    line = {"section": section, "mixer": name, **row}
    print(json.dumps(line), file=sys.stderr, flush=True)
    yield row


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.mixers")
  parser.add_argument(
    "--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS)
  )
  mixers = list(mixer_programs.variants())
  parser.add_argument("--mixers", nargs="+", choices=mixers, default=mixers)
  parser.add_argument(
    "--model", default="spatial_mamba_micro", choices=smj.list_models()
  )
  parser.add_argument("--batch-size", type=positive, default=8)
  parser.add_argument("--sizes", type=positive, nargs="+", help="pixels a side")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
  parser.add_argument(
    "--workdir", type=pathlib.Path, default=pathlib.Path("runs/mixers")
  )
  parser.add_argument(
    "--output", type=json_file, default=RESULTS / "mixers.json"
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
