"""Measures this project on this machine: `python -m benchmarks.device`.

It measures how fast the device copies and multiplies. It times inference and
the training step of tiny, small and base, of UPerNet beside its backbone alone,
and of PyTorch networks of the same size if they are installed. It compares
every kernel's values and gradients with the reference, and times the operators
at the stages of the tiny model. `timing` has the protocol. After `--minutes` it
starts no further measurement, and lists those that it leaves out. It lists a
measurement that fails with the error, and continues, in a new process after a
crash or a hang.

It writes one JSON file, by default into `benchmarks/results`. `python -m
benchmarks.table` prints it as the tables of `docs/measurements.md`. It needs
jax, flax and optax. On a CPU it measures less: the tiny network and the
operators of one stage, in float32 (`--scale`).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from functools import partial
from typing import Any

from benchmarks import processes, sections

RESULTS = pathlib.Path(__file__).parent / "results"
# Seconds without a message after which a measurement counts as hung.
PATIENCE_SECONDS = 180


def main() -> None:
  """Measures and writes the record; exits with status 1 if anything failed."""
  arguments = _parse()
  if arguments.output:
    _make_room(arguments.output)
  deadline = time.time() + 60 * arguments.minutes
  record = Record(arguments.output)
  for section in arguments.sections:
    while not record.measure(section, arguments.scale, deadline):
      pass
  print(f"written to {record.file}", file=sys.stderr)
  complaints = list(_complaints(record))
  if complaints:
    sys.exit("\n".join(complaints))


@dataclasses.dataclass
class Record:
  """The measurements so far, and the file that holds them.

  Attributes:
    file: the JSON file; None for one named after the device.
    machine: properties on which speed may depend.
    rows: {section: its measurements}.
    begun: labels of measurements that were started.
    measuring: label of the running measurement.
    together: whether several programs are compiled at once.
    left_out: labels of measurements that were not started.
    failed: {label: reason}.
  """

  file: pathlib.Path | None
  machine: dict[str, Any] = dataclasses.field(default_factory=dict)
  rows: dict[str, list[dict[str, Any]]] = dataclasses.field(
    default_factory=lambda: {name: [] for name in sections.SECTIONS}
  )
  begun: list[str] = dataclasses.field(default_factory=list)
  measuring: str | None = None
  together: bool = True
  left_out: list[str] = dataclasses.field(default_factory=list)
  failed: dict[str, str] = dataclasses.field(default_factory=dict)

  def measure(self, section: str, scale: str | None, deadline: float) -> bool:
    """Measures a section in one process; returns whether it is complete.

    For the arguments see `sections.work`.
    """
    work = partial(
      sections.work,
      section=section,
      scale=scale,
      machine=self.machine,
      begun=tuple(self.begun),
      together=self.together,
      deadline=deadline,
    )
    try:
      for kind, value in processes.messages(work, patience=PATIENCE_SECONDS):
        print(json.dumps({kind: value}), flush=True)
        self._add(section, kind, value)
        self._write()
    except processes.EndedError as error:
      if not self.machine:
        sys.exit(f"nothing can be measured: {error}")
      return self._is_over(section, str(error))
    return True

  def _is_over(self, section, why):
    """Returns whether a section is over after its process has crashed."""
    label, self.measuring = self.measuring, None
    if label is None and self.together:
      # A compilation crashed; compiled one by one, the label will be known.
      self.together = False
      return False
    # A failure that the process sent says more.
    self.failed.setdefault(label or section, why)
    self._write()
    return label is None

  def _add(self, section, kind, value):
    match kind:
      case "machine":
        self.machine = value
      case "begin":
        self.begun.append(value)
        self.measuring = value
      case "end":
        self.measuring = None
      case "row":
        self.rows[section].append(value)
      case "failed":
        self.failed |= value
      case "left_out":
        self.left_out.append(value)

  def _write(self):
    self.file = self.file or RESULTS / _file_name(self.machine)
    everything = {
      **self.machine,
      **self.rows,
      "left_out": self.left_out,
      "failed": self.failed,
    }
    # Replaced atomically, because this process may end at any moment.
    whole = self.file.with_suffix(".part")
    whole.write_text(json.dumps(everything, indent=1) + "\n")
    os.replace(whole, self.file)


def _make_room(file):
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
  except OSError as error:
    sys.exit(f"--output: {error}")


def _file_name(machine):
  kind = machine["device"].lower().replace(" ", "-")
  return f"{kind}-jax-{machine['versions']['jax']}.json"


def _complaints(record):
  wrong = [row for row in record.rows["operators"] if not row["ok"]]
  if wrong:
    yield f"{len(wrong)} operators are wrong, the first: {wrong[0]}"
  if record.failed:
    yield f"failed: {', '.join(record.failed)}"


def _parse():
  parser = argparse.ArgumentParser(prog="python -m benchmarks.device")
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
  parser.add_argument(
    "--scale",
    choices=sections.SCALES,
    help="sizes to measure; default: by the device",
  )
  parser.add_argument("--minutes", type=float, default=6.5)
  parser.add_argument(
    "--sections",
    nargs="+",
    default=list(sections.SECTIONS),
    choices=sections.SECTIONS,
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
