"""What a run logs: JSON lines, TensorBoard events, a bar or plain lines."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import tqdm
from tensorboardX import SummaryWriter

from spatial_mamba_jax.data import DataConfig

# The share of a window above which waiting for data is worth a warning.
MOST_DATA_WAIT = 0.1


class MetricWriter:
  """Writes each record to `metrics.jsonl` and as TensorBoard events.

  A resumed run drops what was logged after its checkpoint, so that the file
  ends up as if nothing had happened. Of several processes the first one
  writes.
  """

  def __init__(self, workdir: pathlib.Path, *, resumed_step: int):
    """Opens the files of a run that continues after `resumed_step`."""
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    path = workdir / "metrics.jsonl"
    if path.exists():
      _drop_records_after(path, resumed_step)
    self._file = path.open("a")
    self._events = SummaryWriter(
      str(workdir / "tensorboard"),
      purge_step=resumed_step + 1,
      filename_suffix=f".{resumed_step}",
    )

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *error: object) -> None:
    if self._is_writer:
      self._file.close()
      self._events.close()

  def write(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Logs values under "train", "evaluation" or "evaluation_raw"."""
    if not self._is_writer:
      return
    record = {"step": step, "kind": kind, **values}
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(f"{kind}/{name}", value, step)


def _drop_records_after(path: pathlib.Path, step: int) -> None:
  kept = []
  for line in path.read_text().splitlines(keepends=True):
    if not line.endswith("\n") or json.loads(line)["step"] > step:
      break
    kept.append(line)
  partial = path.with_suffix(".tmp")
  partial.write_text("".join(kept))
  os.replace(partial, path)


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
  """A bar where someone watches, else a line for each logged window."""

  def __init__(self, *, step: int, steps: int, epoch_steps: int):
    """Starts at `step` of `steps`."""
    self._steps, self._epoch_steps = steps, epoch_steps
    self._start = (step, time.perf_counter())
    self._bar = None
    self._is_shown = jax.process_index() == 0
    if self._is_shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=step, total=steps, unit="step", dynamic_ncols=True
      )

  def advance(self) -> None:
    """One more step was dispatched."""
    if self._bar is not None:
      self._bar.update()

  def show(self, step: int, metrics: dict[str, float]) -> None:
    """Shows the means of a window and its speed."""
    line = (
      f"loss {metrics['loss']:.4f}  accuracy {100 * metrics['accuracy']:.2f}%"
      f"  {metrics['images_per_second']:.0f} images/s"
      f"  data wait {100 * metrics['data_wait']:.0f}%"
    )
    if self._bar is not None:
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
      tqdm.tqdm.write(line, file=sys.stderr)
      sys.stderr.flush()

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()
