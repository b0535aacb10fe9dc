"""Trains from the first step, or from a checkpoint."""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from spatial_mamba_jax.data import Batches, train_batches
from spatial_mamba_jax.errors import say, tell
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.training.compiled_step import compile_step, load_step
from spatial_mamba_jax.training.config import TrainConfig
from spatial_mamba_jax.training.description import write_description
from spatial_mamba_jax.training.evaluation import Measured, evaluate
from spatial_mamba_jax.training.example_file import write_examples
from spatial_mamba_jax.training.experiment import (
  check_same_experiment,
  describe,
  saved_shards,
)
from spatial_mamba_jax.training.goodput import Ledger, read_goodput
from spatial_mamba_jax.training.local_checkpoints import open_checkpoints
from spatial_mamba_jax.training.memory import measured_line, planned_line
from spatial_mamba_jax.training.metrics import (
  MOST_DATA_WAIT,
  MetricWriter,
  Progress,
  slow_data_warning,
)
from spatial_mamba_jax.training.processes import from_first_process
from spatial_mamba_jax.training.profiling import StepTrace
from spatial_mamba_jax.training.program import copied, make_program
from spatial_mamba_jax.training.sharding import (
  check_batch_sizes,
  local_rows,
  make_mesh,
  shard_batch,
)
from spatial_mamba_jax.training.speed import speed_of, window_metrics
from spatial_mamba_jax.training.state import TrainState
from spatial_mamba_jax.training.stopping import (
  StoppedError,
  stop_requested,
  stop_signals,
)
from spatial_mamba_jax.training.weights import start_from
from spatial_mamba_jax.training.workdir import WorkdirLock

# Number of steps dispatched ahead of the device. Without a limit the host would
# take every batch at once, and appear to wait for data.
_STEPS_IN_FLIGHT = 2


class NonFiniteError(Exception):
  """The loss or the gradient was not finite."""

  status = 1  # The exit status of the command.


def train(
  config: TrainConfig,
  workdir: str | os.PathLike[str],
  *,
  started: float | None = None,
  profile_steps: range = range(0),
  compiled: str | os.PathLike[str] | None = None,
) -> Evaluation | None:
  """Trains; resumes from the newest checkpoint if `workdir` has one.

  Args:
    config: the experiment.
    workdir: the directory of checkpoints and logs.
    started: `time.time()` at the start of the process, for the ledger; None
      for now.
    profile_steps: the steps of which a trace is written, counted from 1.
    compiled: a file with the compiled train step; None to compile it.

  Returns:
    The evaluation after the last step; None if all was already done.

  Raises:
    TrainingError, DataError: something is wrong with the config, the data or
      the files in `workdir`, or another run uses `workdir`.
    SaveError: a checkpoint could not be saved; earlier ones are unchanged.
    OSError: the log could not be written.
    StoppedError: SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C; the run is saved.
    NonFiniteError: the run diverged; all checkpoints are from before.
  """
  config.validate()
  started = time.time() if started is None else started
  workdir = local_path(workdir, "workdir")
  path = local_path(compiled, "--compiled") if compiled else None
  return _Trainer(config, workdir, started, profile_steps, path).run()


class _Trainer:
  """A run of an experiment in a working directory."""

  def __init__(
    self,
    config: TrainConfig,
    workdir: pathlib.Path,
    started: float,
    profile_steps: range,
    compiled: pathlib.Path | None,
  ):
    self.config, self.workdir = config, workdir
    self.started, self.profile_steps = started, profile_steps
    self.mesh = make_mesh(config.mesh)
    check_batch_sizes(config, self.mesh)  # Before the data is opened.
    task = config.create_task()
    self.train_source = task.source("train")
    self.eval_source = task.source("validation")
    self.program = make_program(
      config, self.mesh, train_examples=len(self.train_source)
    )
    self.train_step = load_step(compiled, self.program) if compiled else None
    self.times = self.program.times
    self.steps = self.times.steps
    classes = getattr(self.train_source, "classes", ())
    self.experiment = describe(
      config, len(self.train_source), task.sums, classes
    )
    self.copy = jax.jit(jnp.copy)
    self.is_warned = self.is_memory_told = False
    self.evaluated_shapes = set()

  def run(self) -> Evaluation | None:
    config, workdir = self.config, self.workdir
    with contextlib.ExitStack() as stack:
      self.lock = stack.enter_context(WorkdirLock(workdir))
      self.ledger = Ledger(workdir, self.started)
      self.checkpoints = stack.enter_context(
        open_checkpoints(config, workdir, self.mesh)
      )
      with self.ledger.during("restore"):
        step = self._first_step()
      is_evaluated = not self._is_evaluation_step(
        step
      ) or self.checkpoints.is_evaluated(step)
      if step >= self.steps and is_evaluated:
        tell(f"{workdir}: all {self.steps} steps are already done")
        return None
      if not jax.process_index():
        task = self.program.task
        write_description(workdir / "run.json", config, self.times, task)
      self.writer = stack.enter_context(
        MetricWriter(workdir, resumed_step=step, is_evaluated=is_evaluated)
      )
      self.trace = StepTrace(
        self.profile_steps,
        workdir / "tensorboard",
        self.ledger,
        done=step,
        total=self.steps,
      )
      stack.enter_context(self.ledger.opened(step))
      stack.callback(self.trace.close)
      self.speed = speed_of(self.program)
      state = self._restored_state(step) if step else self._fresh_state()
      self.saved_at = time.monotonic()
      self.progress = Progress(
        step=step, steps=self.steps, epoch_steps=self.times.epoch
      )
      stack.callback(self.progress.close)
      batches = stack.enter_context(self._batches(step))
      # Kernels are sharded over the current mesh.
      stack.enter_context(jax.set_mesh(self.mesh))
      self.stopping = stack.enter_context(stop_signals())
      state = self._finish_log(state, step)
      evaluation = None
      if not is_evaluated:
        self._save(state, wait=True)  # It may be on a local disk only.
        evaluation = self._evaluate(state, step)
      evaluation = self._loop(state, step, batches) or evaluation
      if not jax.process_index():
        self.progress.say(str(read_goodput(workdir)))
      return evaluation

  def _first_step(self) -> int:
    """Returns the step of the checkpoint to resume; 0 where there is none."""
    step = self.checkpoints.newest()
    if step is None:
      return 0
    check_same_experiment(
      self.checkpoints.experiment(step), self.experiment, str(self.workdir)
    )
    self.checkpoints.set_aside_after(step)
    return step

  def _restored_state(self, step: int) -> TrainState:
    if not jax.process_index():
      say(f"resuming {self.workdir} after step {step}")
    with self.ledger.during("restore"):
      return self.program.restored_state(
        lambda like: self.checkpoints.restore_state(step, like),
        shards=saved_shards(self.checkpoints.experiment(step)),
      )

  def _batches(self, step: int) -> Batches:
    return train_batches(
      self.train_source,
      self.config.data,
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      start_step=step,
      rows=local_rows(self.config.batch_size, self.mesh),
      examples=self.program.task.examples(),
    )

  def _fresh_state(self) -> TrainState:
    state = self.program.fresh_state()
    if not self.config.init_from:
      return state
    weights, message = start_from(
      local_path(self.config.init_from, "config.init_from"),
      self.program.model,
      state.weights,
    )
    if not jax.process_index():
      say(message)
    # Copied, because the train step donates the state.
    average = copied(weights)
    return dataclasses.replace(state, weights=weights, ema=average)

  def _loop(
    self, state: TrainState, step: int, batches: Batches
  ) -> Evaluation | None:
    """Trains to the last step; returns the last evaluation."""
    if step >= self.steps:
      return None
    with self.ledger.during("compile"):
      train_step = self.train_step or compile_step(self.program)
    self.ledger.write()
    self.progress.say(planned_line(train_step))
    first = next(batches)  # The workers start.
    self.ledger.window()
    with self.ledger.during("steps"):
      return self._take_steps(
        train_step, state, step, itertools.chain((first,), batches)
      )

  def _take_steps(
    self,
    train_step: jax.stages.Compiled,
    state: TrainState,
    step: int,
    batches: Iterator[Any],
  ) -> Evaluation | None:
    evaluation = None
    in_flight = collections.deque()
    while step < self.steps:
      with self.ledger.during("input"):
        batch = next(batches)
      self.trace.before(step + 1, state)
      state = train_step(state, shard_batch(batch, self.mesh))
      in_flight.append(self.copy(state.step))
      if len(in_flight) > _STEPS_IN_FLIGHT:
        jax.block_until_ready(in_flight.popleft())
      step += 1
      self.ledger.step = step
      self.trace.after(step, state)
      self.progress.advance()
      self.checkpoints.check()
      stopped_by = stop_requested(self.stopping, step)
      is_evaluation_due = self._is_evaluation_step(step)
      is_halting = is_evaluation_due or stopped_by is not None
      if is_halting or self._is_checkpoint_due(step):
        self._check_finite(state)
        with self.ledger.during("save"):
          self._save(state, wait=is_halting)
        self.ledger.write()
      self._log_save()
      if self._is_logged(step):
        state = self._log(state, step)
      if stopped_by:
        self._stop(step, stopped_by)
      if is_evaluation_due:
        evaluation = self._evaluate(state, step)
    return evaluation

  def _is_logged(self, step: int) -> bool:
    return step % self.times.log_every == 0 or step == self.steps

  def _finish_log(self, state: TrainState, step: int) -> TrainState:
    """Logs the window that a killed run saved but did not log.

    The speed of these steps is unknown.
    """
    if not self._is_logged(step):
      return state
    is_empty = not jax.device_get(state.window["steps"])
    if self.writer.last_step < step and not is_empty:
      metrics = self._read_window(state, step)
      del metrics["images"]
      unknown = self.speed.of(math.nan, {"steps": math.nan, "input": math.nan})
      self.writer.write(step, "train", metrics | unknown)
    return dataclasses.replace(state, window=self.program.empty_window())

  def _log(self, state: TrainState, step: int) -> TrainState:
    """Logs a window of steps; returns the state with an empty window."""
    metrics = self._read_window(state, step)
    metrics |= self.speed.of(metrics.pop("images"), self.ledger.window())
    self.ledger.write()
    self.writer.write(step, "train", metrics)
    self.progress.show(step, metrics)
    if not self.is_memory_told:
      self.is_memory_told = True
      if line := measured_line(jax.local_devices()):
        self.progress.say(line)
    if not self.is_warned and metrics["data_wait"] > MOST_DATA_WAIT:
      warning = slow_data_warning(metrics["data_wait"], self.config.data)
      self.progress.say(warning)
      self.is_warned = True
    return dataclasses.replace(state, window=self.program.empty_window())

  def _save(self, state: TrainState, *, wait: bool) -> None:
    self.lock.check()
    self.checkpoints.save(state, self.experiment, wait=wait)
    self.saved_at = time.monotonic()

  def _log_save(self) -> None:
    while save := self.checkpoints.finished_save():
      self.ledger.write_save(save)

  def _stop(self, step: int, stopped_by: signal.Signals) -> NoReturn:
    raise StoppedError(
      f"stopped by {stopped_by.name} after step {step}, which is saved;"
      " the same command resumes",
      stopped_by,
    )

  def _is_evaluation_step(self, step: int) -> bool:
    is_due = step % self.times.evaluate_every == 0 or step == self.steps
    return step > 0 and is_due

  def _is_checkpoint_due(self, step: int) -> bool:
    """Whether `config.checkpoint_every` asks for a checkpoint."""
    interval = self.config.checkpoint_interval()
    if interval is None:
      return False
    if interval.unit != "minutes":
      return step % interval.steps(self.times.epoch) == 0
    # Clocks differ, so one process decides. The others wait for its decision,
    # so it decides only when a line is logged.
    if jax.process_count() > 1 and step % self.times.log_every:
      return False
    minutes = 60 * interval.count
    return from_first_process(
      lambda: time.monotonic() - self.saved_at >= minutes
    )

  def _evaluate(self, state: TrainState, step: int) -> Evaluation:
    """Evaluates the weights and their moving average, whose score counts."""

    def eval_step(weights, batch):
      if stopped_by := stop_requested(self.stopping):
        self._stop(step, stopped_by)
      # Each shape has a program.
      shapes = tuple(x.shape for x in batch.values())
      is_compiled = shapes in self.evaluated_shapes
      self.evaluated_shapes.add(shapes)
      with self.ledger.during("evaluation" if is_compiled else "compile"):
        return self.program.eval_step(weights, batch)

    weights = {"ema": state.ema}
    if self.config.ema_decay:
      weights["raw"] = state.weights
    with self.ledger.during("evaluation"):
      found = evaluate(
        dataclasses.replace(self.program, eval_step=eval_step),
        weights,
        self.eval_source,
      )
      return self._log_evaluation(found, step)

  def _log_evaluation(
    self, found: dict[str, Measured], step: int
  ) -> Evaluation:
    evaluation = found["ema"].evaluation
    raw = found["raw"].evaluation if "raw" in found else evaluation
    # First, so that a run that fails to write it repeats the evaluation.
    if not jax.process_index():
      write_examples(self.workdir, found["ema"].meter, step)
    self.writer.write(step, "evaluation", evaluation.values)
    self.writer.write(step, "evaluation_raw", raw.values)
    self.checkpoints.add_evaluation(step, evaluation)
    when = f"epoch {step / self.times.epoch:.6g}"
    self.progress.say(f"{when}: ema  {evaluation}\n{when}: raw  {raw}")
    self.ledger.write()
    return evaluation

  def _read_window(self, state: TrainState, step: int) -> dict[str, float]:
    self._check_finite(state)
    return window_metrics(self.program, state.window, step)

  def _check_finite(self, state: TrainState) -> None:
    bad_step = int(jax.device_get(state.bad_step))
    if bad_step >= 0:
      raise NonFiniteError(
        f"the loss or the gradient of step {bad_step} is not finite; the"
        f" checkpoints in {self.workdir} are from earlier steps: lower"
        " config.optimizer.learning_rate or raise its warmup"
      )
