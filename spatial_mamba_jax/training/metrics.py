"""Logs of a run: JSON lines, TensorBoard events, progress on a terminal."""

import json
import math
import os
import pathlib
import sys
import time
from contextlib import suppress
from typing import Any

import jax
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (
  Event,  # pyright: ignore[reportAttributeAccessIssue]
  SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.proto.summary_pb2 import (
  Summary,  # pyright: ignore[reportAttributeAccessIssue]
)

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.errors import naming, say
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.digests import write_whole

# Fraction of a window's time above which waiting for data causes a warning.
MOST_DATA_WAIT = 0.1

# Metrics that a line on the terminal omits, or has in another form.
_NOT_SHOWN = (
  *("grad_norm", "learning_rate"),
  *("images_per_second", "data_wait", "model_flops_per_second", "mfu"),
)


class MetricWriter:
  """Writes each record to `metrics.jsonl` and as TensorBoard events.

  Each record is flushed at once, so that it survives a killed process. A
  resumed run drops the records after its checkpoint, so that the file equals
  that of an uninterrupted run. Of several processes, the first one writes.

  Attributes:
    last_step: the step of the last training record when the file was opened.
  """

  def __init__(
    self, workdir: pathlib.Path, *, resumed_step: int, is_evaluated: bool = True
  ):
    """Opens the files of a run that resumes after `resumed_step`.

    Args:
      workdir: the working directory.
      resumed_step: the number of steps already taken.
      is_evaluated: whether the evaluation after that step, if one is due, is
        done. If not, its records are dropped, too.

    Raises:
      OSError: a file cannot be written.
      TrainingError: `metrics.jsonl` is not a regular file.
    """
    self.last_step = 0
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    # Resolved, so that a symbolic link is not replaced by a file.
    self._path = path = (workdir / "metrics.jsonl").resolve()
    if path.exists() and not path.is_file():
      raise TrainingError(f"{path} is not a file: move it away")
    records = []
    if path.exists():
      records = _drop_records_after(path, resumed_step, is_evaluated)
    steps = (x["step"] for x in records if x["kind"] == "train")
    self.last_step = max(steps, default=0)
    directory = workdir / "tensorboard"
    directory.mkdir(exist_ok=True)
    # Not SummaryWriter, whose thread delays events.
    self._events = EventsWriter(
      str(directory / "events"), f".{resumed_step}.{os.getpid()}"
    )
    # A START event makes TensorBoard drop the events of this and later steps in
    # earlier files.
    first = resumed_step + is_evaluated
    self._write_event(first, session_log=SessionLog(status=SessionLog.START))
    for record in records:
      if record["step"] >= first:
        self._write_scalars(record)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, kind: object, *error: object) -> None:
    if not self._is_writer:
      return
    try:
      self._events.close()
    except OSError:
      if kind is None:
        raise

  def write(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Logs a record of one step.

    Args:
      step: the step.
      kind: "train", "evaluation" or "evaluation_raw".
      values: {name: value}. JSON has null for a value that is not finite.

    Raises:
      OSError: a file cannot be written.
    """
    if not self._is_writer:
      return
    finite = {name: _finite(value) for name, value in values.items()}
    record = {"step": step, "kind": kind, **finite}
    # Opened for each record, because a user may move the file away.
    with naming(self._path), self._path.open("a") as file:
      file.write(json.dumps(record, allow_nan=False) + "\n")
    self._write_scalars({**record, **values})

  def _write_scalars(self, record: dict[str, Any]) -> None:
    scalars = [
      Summary.Value(
        tag=f"{record['kind']}/{name}",
        simple_value=math.nan if value is None else value,
      )
      for name, value in record.items()
      if name not in ("step", "kind")
    ]
    self._write_event(record["step"], summary=Summary(value=scalars))

  def _write_event(self, step: int, **content: Any) -> None:
    event = Event(wall_time=time.time(), step=step, **content)
    with naming(self._path.with_name("tensorboard")):
      self._events.write_event(event)
      self._events.flush()


def _drop_records_after(
  path: pathlib.Path, step: int, is_evaluated: bool
) -> list[dict[str, Any]]:
  """Drops later records from the file; returns those that remain.

  Damaged lines are moved to another file.
  """
  remaining, damaged = [], []
  *lines, tail = path.read_bytes().split(b"\n")
  # A last line without a newline was cut off; its record will be logged again.
  if tail and not tail.startswith(b"{"):
    lines.append(tail)
  for line in lines:
    record = _parse_record(line)
    if record is None:
      damaged.append(line + b"\n")
    elif record["step"] < step or (
      record["step"] == step and (is_evaluated or record["kind"] == "train")
    ):
      remaining.append(record)
  if damaged:
    aside = path.with_name(f"{path.name}.damaged")
    with naming(aside), aside.open("ab") as file:
      file.writelines(damaged)
    say(f"{path}: {len(damaged)} damaged lines were moved to {aside}")
  write_whole(path, "".join(json.dumps(record) + "\n" for record in remaining))
  return remaining


def _finite(value: Any) -> Any:
  """Returns the value; None for NaN and infinity, which JSON does not have."""
  is_finite = not isinstance(value, float) or math.isfinite(value)
  return value if is_finite else None


def _parse_record(line: bytes) -> dict[str, Any] | None:
  """Parses a line of the log; returns None where it is not a record."""
  try:
    # Earlier versions wrote NaN and Infinity, which JSON does not have.
    record = json.loads(line, parse_constant=lambda _: None)
    if type(record["step"]) is int and isinstance(record["kind"], str):
      return {k: _finite(x) for k, x in record.items()}
  except (KeyError, RecursionError, TypeError, ValueError):
    pass
  return None


def slow_data_warning(fraction: float, data: DataConfig) -> str:
  """Returns a warning that says how to speed up the input pipeline."""
  return (
    f"the device waits for data {fraction:.0%} of the time: raise"
    f" config.data.num_workers (now {data.num_workers}; this host has"
    f" {os.cpu_count()} cores); python -m benchmarks.input shows what is slow"
  )


class Progress:
  """Shows progress: a bar on a terminal, else a line per logged window.

  Errors of a closed terminal are ignored.
  """

  def __init__(self, *, step: int, steps: int, epoch_steps: int):
    """Starts the display.

    Args:
      step: the number of steps already taken.
      steps: steps of the whole run.
      epoch_steps: steps per epoch.
    """
    self._steps, self._epoch_steps = steps, epoch_steps
    self._start = (step, time.perf_counter())
    self._bar = None
    # sys.stderr is None if it was closed when Python started.
    self._is_shown = jax.process_index() == 0 and bool(sys.stderr)
    if self._is_shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=step, total=steps, unit="step", dynamic_ncols=True
      )

  def advance(self) -> None:
    """Advances the bar by one step."""
    if self._bar is not None:
      with suppress(OSError):
        self._bar.update()

  def show(self, step: int, metrics: dict[str, float]) -> None:
    """Shows the metrics of a window and its speed."""
    values = "  ".join(
      f"{name.replace('_', ' ')} {value:.4g}"
      for name, value in metrics.items()
      if name not in _NOT_SHOWN
    )
    line = f"{values}  {_speed(metrics)}"
    if self._bar is not None:
      with suppress(OSError):
        self._bar.set_postfix_str(line)
      return
    first, since = self._start
    seconds = (time.perf_counter() - since) * (self._steps - step)
    left = seconds / max(step - first, 1)
    self.say(
      f"step {step}/{self._steps}  epoch {step / self._epoch_steps:.2f}"
      f"  {line}  {left / 60:.1f} min left"
    )

  def say(self, line: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self._is_shown:
      with suppress(OSError):
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

  def close(self) -> None:
    """Closes the bar."""
    if self._bar is not None:
      with suppress(OSError):
        self._bar.close()


def _speed(metrics: dict[str, float]) -> str:
  parts = [f"{metrics['images_per_second']:.0f} images/s"]
  if (flops := metrics.get("model_flops_per_second")) is not None:
    unit, scale = ("TFLOP/s", 1e12) if flops >= 1e12 else ("GFLOP/s", 1e9)
    parts.append(f"{flops / scale:.3g} {unit}")
  if (mfu := metrics.get("mfu")) is not None:
    parts.append(f"MFU {mfu:.0%}")
  return "  ".join([*parts, f"data wait {metrics['data_wait']:.0%}"])
