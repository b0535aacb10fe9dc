"""Reads the log and the description of a run from its working directory."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from spatial_mamba_jax.fields import FLOAT32_MAX, INT32_MAX
from spatial_mamba_jax.tasks.base import Column, Line, Panel
from spatial_mamba_jax.tasks.classification import panels as classification
from spatial_mamba_jax.training.example_file import (
  ExamplePicture,
  read_examples,
)
from spatial_mamba_jax.training.goodput import Goodput, read_goodput

# Maximum length of a column's format; ".2%" has three characters. A longer one
# could pad a number to any width.
_MAX_FORMAT_LENGTH = 4


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """The parts of a `Task` that a report needs; the fields are those of `Task`.

  The defaults describe classification.
  """

  score: str = classification.SCORE
  panels: Sequence[Panel] = classification.PANELS
  columns: Sequence[Column] = classification.COLUMNS


@dataclasses.dataclass(frozen=True)
class RunLog:
  """The log and the description of a run.

  Attributes:
    name: the name of the working directory.
    records: the records of the log, sorted by step.
    description: the content of `run.json`; empty where it cannot be read.
    task: how to show the task of the run.
    goodput: where the time went; None where `goodput.jsonl` is missing.
    notes: sentences about damaged or missing files.
    examples: a picture of predictions; None where there is none.
  """

  name: str
  records: list[dict[str, Any]]
  description: dict[str, Any]
  task: TaskReport
  goodput: Goodput | None
  notes: list[str]
  examples: ExamplePicture | None

  def of_kind(self, kind: str) -> list[dict[str, Any]]:
    """Returns the records of one kind."""
    return [record for record in self.records if record["kind"] == kind]

  def points(self, line: Line) -> tuple[list[int], list[float]]:
    """Returns the steps and the values of a line, NaN for non-finite values."""
    pairs = [
      (record["step"], to_float(record.get(line.value)))
      for record in self.of_kind(line.kind)
    ]
    pairs = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]

  @property
  def evaluations(self) -> list[dict[str, Any]]:
    """The evaluations of the moving average that have a score."""
    return [
      record
      for record in self.of_kind("evaluation")
      if to_float(record.get(self.task.score)) is not None
    ]

  @property
  def best(self) -> dict[str, Any] | None:
    """The evaluation whose checkpoint is kept as the best; None before one.

    Of equal scores it is the later one, by the rule for the best checkpoint.
    """

    def rank(record: dict[str, Any]) -> tuple[float | int, int]:
      score = record[self.task.score]
      return -math.inf if math.isnan(score) else score, record["step"]

    return max(self.evaluations, key=rank, default=None)

  @property
  def last_step(self) -> int:
    """The step of the last record."""
    return self.records[-1]["step"]

  @property
  def epoch_steps(self) -> float | None:
    """Steps per epoch; None where `run.json` does not have them."""
    steps = to_float(self.description.get("epoch_steps"))
    return steps if steps and steps >= 1 else None


def read_run(workdir: pathlib.Path) -> RunLog:
  """Reads `metrics.jsonl`, `run.json`, `goodput.jsonl` and `examples.png`.

  Raises:
    ValueError: there is nothing to draw.
    OSError: a file cannot be read.
  """
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    raise ValueError(f"{path} does not exist: give the --workdir of train.py")
  *lines, last = path.read_text(errors="replace").split("\n")
  parsed = [_parse_record(line) for line in lines]
  records = [record for record in parsed if record is not None]
  notes = []
  if damaged := len(parsed) - len(records):
    notes.append(f"{damaged} lines of metrics.jsonl are damaged and left out.")
  if last:
    # The run was killed while it wrote this line, or is writing it now.
    notes.append("The last line of metrics.jsonl is incomplete and left out.")
  if not records:
    raise ValueError(
      f"{path} holds no records yet: the first is written after the first"
      " config.log_every steps"
    )
  try:
    description = dict(json.loads((workdir / "run.json").read_text()))
    task = _read_task(description)
  except (OSError, RecursionError, TypeError, ValueError):
    notes.append("run.json cannot be read: the config of the run is unknown.")
    description, task = {}, TaskReport()
  goodput = read_goodput(workdir)
  if goodput and goodput.damaged:
    notes.append(
      f"{goodput.damaged} lines of goodput.jsonl are damaged and left out."
    )
  try:
    examples = read_examples(workdir)
  except ValueError as error:
    notes.append(f"{error}, and is left out.")
    examples = None
  records.sort(key=lambda record: record["step"])
  name = workdir.resolve().name.encode(errors="replace").decode()
  return RunLog(name, records, description, task, goodput, notes, examples)


def _read_task(description: Any) -> TaskReport:
  """Reads the task from `run.json`; version 1 had classification alone.

  Raises:
    ValueError: the entry "task" is malformed.
  """
  task = description.get("task")
  if task is None:
    return TaskReport()
  try:
    panels = [
      Panel(**{**x, "lines": [Line(*line) for line in x["lines"]]})
      for x in task["panels"]
    ]
    columns = [Column(*x) for x in task["columns"]]
    score = task["score"]
    lines = [line for panel in panels for line in panel.lines]
    texts = [x for panel in panels for x in (panel.title, panel.unit)]
    texts += [x for row in (*lines, *columns) for x in row]
    scales = [panel.scale for panel in panels]
    if not all(isinstance(x, str) for x in (score, *texts)) or None in map(
      to_float, scales
    ):
      raise TypeError
    for column in columns:
      if len(column.form) > _MAX_FORMAT_LENGTH:
        raise ValueError("the format of a column is too long")
      format(0.0, column.form)
    return TaskReport(score, panels, columns)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError("the task is malformed") from error


def _parse_record(line: str) -> dict[str, Any] | None:
  """Parses a line of the log; returns None where it is not a record.

  JSON's null stands for a value that was not finite; it becomes NaN.
  """
  try:
    record = json.loads(line)
  except (RecursionError, ValueError):
    return None
  if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
    return None
  step = record.get("step")
  if type(step) is not int or abs(step) > INT32_MAX:
    return None
  return {k: math.nan if _is_lost(x) else x for k, x in record.items()}


def _is_lost(value: Any) -> bool:
  """Whether a value was not finite, or is an integer too large for a float."""
  return value is None or (isinstance(value, int) and abs(value) > FLOAT32_MAX)


def to_float(value: Any) -> float | None:
  """Returns a logged value as a float; None where it is not a number.

  An infinity becomes NaN, which is not drawn.
  """
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) if -FLOAT32_MAX <= value <= FLOAT32_MAX else math.nan
