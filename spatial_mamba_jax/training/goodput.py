"""The ledger of a run: the part of its life in which each second was spent.

`goodput.jsonl` in the working directory has the ledger of every process that
the run had. Each line of kind "time" repeats the seconds of its process so far,
so that a damaged line loses nothing once a later one is written. Goodput is the
share of the run's life in which steps were computed that the run still has.
"""

import itertools
import json
import math
import pathlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax
import numpy as np

from spatial_mamba_jax.errors import naming
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.digests import regular
from spatial_mamba_jax.training.save_clock import Save

# {part: description} of the time of a process.
_PARTS = {
  "steps": "productive steps",
  "start": "start and end: imports, data sets, workers, the initial state",
  "compile": "compilation",
  "input": "waiting for input",
  "evaluation": "evaluation",
  "save": "waiting for saves",
  "restore": "restoring a checkpoint",
  "profile": "writing a trace",
}
# {part: description} of the life of a run.
PARTS = {
  **_PARTS,
  "lost": "lost work: steps computed after the checkpoint that was resumed",
  "down": "down time: from the last record of a process to the next start",
}
_NAME = "goodput.jsonl"


class Ledger:
  """Assigns every second of a process to one part, and writes the sums.

  Of several processes, the first one writes.

  Attributes:
    step: the last step that the process has taken.
  """

  def __init__(self, workdir: pathlib.Path, started: float):
    """Begins with the part "start"; writes nothing yet.

    Args:
      workdir: the working directory.
      started: `time.time()` at the start of the process.

    Raises:
      TrainingError: `goodput.jsonl` is not a regular file.
    """
    self.step = self._resumed = 0
    self._is_writer = jax.process_index() == 0
    self._path = workdir / _NAME
    exists = self._is_writer and self._path.exists()
    if exists and not self._path.is_file():
      raise TrainingError(f"{self._path} is not a file: move it away")
    # The clock never jumps, as the system's time may.
    self._clock_zero = time.time() - time.perf_counter()
    self._started = min(started, self._now())
    self._part, self._since = "start", self._started
    self._seconds = dict.fromkeys(_PARTS, 0.0)
    self._window_start = dict(self._seconds)

  @contextmanager
  def opened(self, resumed: int) -> Iterator[None]:
    """Writes the seconds before and after the `with` block.

    Args:
      resumed: the step after which the process resumes; 0 for none.

    Raises:
      OSError: the file cannot be written.
    """
    self.step = self._resumed = resumed
    self.write()
    try:
      yield
    except BaseException:
      with suppress(OSError):  # The first error is reported.
        self.write()
      raise
    self.write()

  @contextmanager
  def during(self, part: str) -> Iterator[None]:
    """Assigns the time of the `with` block to a part, one of `_PARTS`."""
    outer = self._enter(part)
    try:
      yield
    finally:
      self._enter(outer)

  def window(self) -> dict[str, float]:
    """Returns the seconds of each part since the last call."""
    self._enter(self._part)
    window = {
      part: seconds - self._window_start[part]
      for part, seconds in self._seconds.items()
    }
    self._window_start = dict(self._seconds)
    return window

  def write(self) -> None:
    """Writes the seconds so far.

    Raises:
      OSError: the file cannot be written.
    """
    self._enter(self._part)
    self._append(
      kind="time",
      started=round(self._started, 4),
      until=round(self._since, 4),
      resumed=self._resumed,
      step=self.step,
      seconds={part: round(x, 4) for part, x in self._seconds.items()},
    )

  def write_save(self, save: Save) -> None:
    """Writes what a checkpoint cost.

    Raises:
      OSError: the file cannot be written.
    """
    self._append(
      kind="save",
      step=save.step,
      blocked=round(save.blocked, 4),
      durable=round(save.durable, 4),
      bytes=save.bytes,
      is_local=save.is_local,
    )

  def _now(self) -> float:
    return self._clock_zero + time.perf_counter()

  def _enter(self, part: str) -> str:
    """Begins a part; returns the one before."""
    now, before = self._now(), self._part
    self._seconds[before] += now - self._since
    self._part, self._since = part, now
    return before

  def _append(self, **record: Any) -> None:
    if not self._is_writer:
      return
    with naming(self._path), self._path.open("ab+") as file:
      # A killed process may have left half a line.
      size = file.seek(0, 2)
      file.seek(max(size - 1, 0))
      end = b"" if file.read() in (b"", b"\n") else b"\n"
      file.write(end + json.dumps(record).encode() + b"\n")


class Goodput(NamedTuple):
  """The ledger of a whole run.

  Attributes:
    seconds: {part: seconds}, for each of `PARTS`.
    wall: seconds from the start of the first process to the last record. If
      the system's clock was set back in between, the seconds that it lost are
      added.
    started: when the first process started, in seconds of Unix time.
    starts: how many processes the run had, one after the other.
    saves: what each checkpoint cost.
    damaged: lines that are not records.
  """

  seconds: dict[str, float]
  wall: float
  started: float
  starts: int
  saves: list[Save]
  damaged: int

  def share(self, part: str) -> float:
    """The share of a part in the sum of all."""
    return self.seconds[part] / max(sum(self.seconds.values()), 1e-9)

  def __str__(self) -> str:
    """The shares of all parts that have one, in one line."""
    shares = (
      f"{part} {self.share(part):.1%}"
      for part, seconds in self.seconds.items()
      if seconds and part != "steps"
    )
    return (
      f"goodput {self.share('steps'):.1%} of {duration(self.wall)}:"
      f" {', '.join(shares)}"
    )


def duration(seconds: float) -> str:
  """Returns a duration with its unit: "9 ms", "41 s", "12.5 min" or "3.2 h"."""
  if 0 < seconds < 0.1:
    return f"{1000 * seconds:.3g} ms"
  if seconds < 60:
    return f"{seconds:.3g} s"
  if seconds < 3600:
    return f"{seconds / 60:.1f} min"
  return f"{seconds / 3600:,.1f} h"


class _Record(NamedTuple):
  """A line of kind "time"."""

  started: float
  until: float
  resumed: int
  step: int
  seconds: dict[str, float]


def read_goodput(workdir: pathlib.Path) -> Goodput | None:
  """Reads `goodput.jsonl`; damaged lines are left out.

  Returns:
    The ledger; None where there is no file, or no record in it.

  Raises:
    OSError: the file cannot be read.
  """
  path = workdir / _NAME
  if not path.exists():
    return None
  lines = regular(path).read_bytes().split(b"\n")
  records = [_parse(line) for line in lines if line]
  times = [x for x in records if isinstance(x, _Record)]
  processes = [
    list(group) for _, group in itertools.groupby(times, lambda x: x.started)
  ]
  if not processes:
    return None
  return Goodput(
    seconds=_sum_up(processes),
    wall=_wall(processes),
    started=processes[0][0].started,
    starts=len(processes),
    saves=[x for x in records if isinstance(x, Save)],
    damaged=records.count(None),
  )


def _wall(processes: list[list[_Record]]) -> float:
  lives = (records[-1].until - records[0].started for records in processes)
  return sum(lives) + sum(_gaps(processes))


def _gaps(processes: list[list[_Record]]) -> list[float]:
  """Seconds from the last record of each process to the start of the next."""
  return [
    max(0.0, after[0].started - before[-1].until)
    for before, after in itertools.pairwise(processes)
  ]


def _sum_up(processes: list[list[_Record]]) -> dict[str, float]:
  """Adds up the seconds of all processes, each a list of its records."""
  total = dict.fromkeys(PARTS, 0.0)
  resumed = math.inf
  # Backwards: a later process may have resumed an earlier checkpoint.
  for records in reversed(processes):
    last = records[-1]
    for part, seconds in last.seconds.items():
      total[part] += seconds
    lost = last.seconds["steps"] - _seconds_at(records, resumed)
    total["steps"] -= lost
    total["lost"] += lost
    resumed = min(resumed, records[0].resumed)
  total["down"] = sum(_gaps(processes))
  return total


def _seconds_at(records: list[_Record], step: float | int) -> float:
  """Seconds in steps when a process had taken a step."""
  known = {records[0].resumed: 0.0}
  known |= {record.step: record.seconds["steps"] for record in records}
  return float(np.interp(step, list(known), list(known.values())))


def _parse(line: bytes) -> _Record | Save | None:
  """Parses a line; returns None where it is not a record."""
  try:
    record = json.loads(line)
    kind = {"time": _Record, "save": Save}[record.pop("kind")]
    parsed = kind(**record)
    is_flag = isinstance(record.pop("is_local", False), bool)
    numbers = record.values()
    if isinstance(parsed, _Record):
      if not {"steps"} <= parsed.seconds.keys() <= _PARTS.keys():
        return None
      seconds = record.pop("seconds")
      numbers = [*record.values(), *seconds.values()]
    is_damaged = not (is_flag and all(map(_is_number, numbers)))
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
    return None
  return None if is_damaged else parsed


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and 0 <= value < 1e15
