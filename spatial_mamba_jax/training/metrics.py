"""What a run logs: JSON lines, TensorBoard events, a bar or plain lines."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

# The share of a window above which waiting for data is worth a warning.
MOST_DATA_WAIT = 0.1

# What a line on the terminal does not have, or in another form.
_NOT_SHOWN = ("grad_norm", "learning_rate", "images_per_second", "data_wait")


class MetricWriter:
  """Writes each record to `metrics.jsonl` and as TensorBoard events.

  Both have a record once it is written, whatever becomes of the process. A
  resumed run drops what was logged after its checkpoint, so that the file ends
  up as if nothing had happened. Of several processes the first one writes.

  Attributes:
    last_step: of the last window of steps that was logged before.
  """

  def __init__(
    self, workdir: pathlib.Path, *, resumed_step: int, is_evaluated: bool = True
  ):
    """Opens the files of a run that continues after `resumed_step`.

    Args:
      workdir: where they are.
      resumed_step: steps taken already.
      is_evaluated: whether the evaluation after that step, if one is due, has
        been done; otherwise what is logged of it is dropped as well.

    Raises:
      OSError: a file cannot be written.
    """
    self.last_step = 0
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    # A link stays one.
    self._path = path = (workdir / "metrics.jsonl").resolve()
    if path.exists() and not path.is_file():
      raise TrainingError(f"{path} is no file: move it away")
    kept = []
    if path.exists():
      kept = _drop_records_after(path, resumed_step, is_evaluated)
    steps = (x["step"] for x in kept if x["kind"] == "train")
    self.last_step = max(steps, default=0)
    directory = workdir / "tensorboard"
    directory.mkdir(exist_ok=True)
    # Not SummaryWriter, whose thread would hold events back.
    self._events = EventsWriter(
      str(directory / "events"), f".{resumed_step}.{os.getpid()}"
    )
    # TensorBoard forgets what other files have of this and later steps.
    first = resumed_step + is_evaluated
    self._write_event(first, session_log=SessionLog(status=SessionLog.START))
    for record in kept:
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
    """Logs values under "train", "evaluation" or "evaluation_raw".

    JSON has null for what is not finite.

    Raises:
      OSError: a file cannot be written.
    """
    if not self._is_writer:
      return
    finite = {name: _finite(value) for name, value in values.items()}
    record = {"step": step, "kind": kind, **finite}
    # Opened anew, in case someone has moved the file away.
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
  """Keeps and returns the records up to a step; moves the damaged elsewhere."""
  kept, damaged = [], []
  *lines, tail = path.read_bytes().split(b"\n")
  # A record without an end was cut off, and will be logged again.
  if tail and not tail.startswith(b"{"):
    lines.append(tail)
  for line in lines:
    record = _parse_record(line)
    if record is None:
      damaged.append(line + b"\n")
    elif record["step"] < step or (
      record["step"] == step and (is_evaluated or record["kind"] == "train")
    ):
      kept.append(record)
  if damaged:
    aside = path.with_name(f"{path.name}.damaged")
    with naming(aside), aside.open("ab") as file:
      file.writelines(damaged)
    say(f"{path}: {len(damaged)} damaged lines were moved to {aside}")
  write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
  return kept


def _finite(value: Any) -> Any:
  """The value; None where it is a float that JSON does not have."""
  is_finite = not isinstance(value, float) or math.isfinite(value)
  return value if is_finite else None


def _parse_record(line: bytes) -> dict[str, Any] | None:
  """A record; None for what is none."""
  try:
    # Earlier versions wrote NaN and Infinity, which JSON does not have.
    record = json.loads(line, parse_constant=lambda _: None)
    if type(record["step"]) is int and isinstance(record["kind"], str):
      return {k: _finite(x) for k, x in record.items()}
  except (KeyError, RecursionError, TypeError, ValueError):
    pass
  return None


class Stopwatch:
  """Times a logged window, and how much of it the loop waited for data."""

  def __init__(self):
    """Starts the first window."""
    self._since = time.perf_counter()
    self._waited = 0.0

  def next(self, batches: Iterator[Any]) -> Any:
    """The next batch; until it is there, time is spent waiting."""
    start = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - start
    return batch

  @contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out what is done within."""
    start = time.perf_counter()
    yield
    self._since += time.perf_counter() - start

  def read(self, images: float) -> dict[str, float]:
    """The speed of a window with so many images; the next one begins."""
    seconds = time.perf_counter() - self._since
    speed = {
      "images_per_second": images / seconds,
      "data_wait": self._waited / seconds,
    }
    self._since += seconds
    self._waited = 0.0
    return speed


def slow_data_warning(share: float, data: DataConfig) -> str:
  """Says what to do about a loop that waits for data."""
  return (
    f"the device waits for data {share:.0%} of the time: raise"
    f" config.data.num_workers (now {data.num_workers}; this host has"
    f" {os.cpu_count()} cores); python -m benchmarks.input shows what is slow"
  )


class Progress:
  """A bar where someone watches, else a line for each logged window.

  A terminal that was closed takes no lines; the run goes on without.
  """

  def __init__(self, *, step: int, steps: int, epoch_steps: int):
    """Starts at `step` of `steps`."""
    self._steps, self._epoch_steps = steps, epoch_steps
    self._start = (step, time.perf_counter())
    self._bar = None
    # There is no standard error where it was closed at the start.
    self._is_shown = jax.process_index() == 0 and bool(sys.stderr)
    if self._is_shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=step, total=steps, unit="step", dynamic_ncols=True
      )

  def advance(self) -> None:
    """One more step was dispatched."""
    if self._bar is not None:
      with suppress(OSError):
        self._bar.update()

  def show(self, step: int, metrics: dict[str, float]) -> None:
    """Shows the means of a window and its speed."""
    values = "  ".join(
      f"{name.replace('_', ' ')} {value:.4g}"
      for name, value in metrics.items()
      if name not in _NOT_SHOWN
    )
    line = (
      f"{values}  {metrics['images_per_second']:.0f} images/s"
      f"  data wait {100 * metrics['data_wait']:.0f}%"
    )
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
    """Prints a line, above the bar where there is one."""
    if self._is_shown:
      with suppress(OSError):
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      with suppress(OSError):
        self._bar.close()
