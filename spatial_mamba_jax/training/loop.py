"""Trains from the first step, or from a checkpoint; evaluates checkpoints."""

import collections
import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import time
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from spatial_mamba_jax.data import Batches, train_batches
from spatial_mamba_jax.errors import reason, say, tell
from spatial_mamba_jax.paths import local_path, make_directory
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.description import write_description
from spatial_mamba_jax.training.evaluation import evaluate
from spatial_mamba_jax.training.experiment import (
  check_same_experiment,
  describe,
  saved_shards,
)
from spatial_mamba_jax.training.metrics import (
  MOST_DATA_WAIT,
  MetricWriter,
  Progress,
  Stopwatch,
  slow_data_warning,
)
from spatial_mamba_jax.training.processes import from_first_process
from spatial_mamba_jax.training.program import (
  copied,
  make_evaluator,
  make_program,
)
from spatial_mamba_jax.training.sharding import (
  check_batch_sizes,
  local_rows,
  make_mesh,
  shard_batch,
)
from spatial_mamba_jax.training.state import TrainState
from spatial_mamba_jax.training.stopping import (
  StoppedError,
  stop_requested,
  stop_signals,
)
from spatial_mamba_jax.training.weights import load_weights, start_from
from spatial_mamba_jax.training.workdir import WorkdirLock

# Number of steps dispatched ahead of the device. Without a limit the host would
# take every batch at once, and appear to wait for data.
_STEPS_IN_FLIGHT = 2


class NonFiniteError(Exception):
  """The loss or the gradient was not finite."""

  status = 1  # The exit status of the command.


def train(
  config: TrainConfig, workdir: str | os.PathLike[str]
) -> Evaluation | None:
  """Trains; resumes from the newest checkpoint if `workdir` has one.

  Args:
    config: the experiment.
    workdir: the directory of checkpoints and logs.

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
  return _Trainer(config, local_path(workdir, "workdir")).run()


class Evaluated(NamedTuple):
  """The result of `evaluate_checkpoint`.

  Attributes:
    step: the step of the checkpoint; None for a file of weights.
    evaluations: the evaluations of the moving average, "ema", and of the
      weights, "raw". Some files have only one of the two.
  """

  step: int | None
  evaluations: dict[str, Evaluation]


def evaluate_checkpoint(
  config: TrainConfig,
  path: str | os.PathLike[str],
  output_dir: str | os.PathLike[str] | None = None,
) -> Evaluated:
  """Evaluates the weights of a checkpoint and their moving average.

  Args:
    config: the experiment.
    path: the weights; see `load_weights`.
    output_dir: the directory for the predictions, with a subdirectory for each
      set of weights; None to write none. See `Meter.write`.

  Raises:
    UserError: something is wrong with the config, the data or `path`.
  """
  config.validate()
  directory = local_path(output_dir, "output_dir") if output_dir else None
  if directory:
    _check_writable(directory)  # Before the evaluation, which is long.
  mesh = make_mesh(config.mesh)
  evaluator = make_evaluator(config, mesh)
  source = evaluator.task.source("validation")
  step, weights = load_weights(
    local_path(path), evaluator.model, evaluator.weight_shapes
  )
  with jax.set_mesh(mesh):  # Kernels are sharded over it.
    found = evaluate(evaluator, weights, source)
  if directory and not jax.process_index():
    for name, each in found.items():
      make_directory(directory / name)
      each.meter.write(directory / name)
  return Evaluated(step, {k: each.evaluation for k, each in found.items()})


def _check_writable(directory: pathlib.Path) -> None:
  try:
    make_directory(directory)
  except OSError as error:
    raise TrainingError(
      f"cannot write to {directory}: {reason(error, directory)}"
    ) from error


class _Trainer:
  """A run of an experiment in a working directory."""

  def __init__(self, config: TrainConfig, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.mesh = make_mesh(config.mesh)
    check_batch_sizes(config, self.mesh)  # Before the data is opened.
    task = config.create_task()
    self.train_source = task.source("train")
    self.eval_source = task.source("validation")
    self.program = make_program(
      config, self.mesh, train_examples=len(self.train_source)
    )
    self.times = self.program.times
    self.steps = self.times.steps
    self.experiment = describe(config, len(self.train_source), task.sums)
    self.copy = jax.jit(jnp.copy)
    self.is_warned = False

  def run(self) -> Evaluation | None:
    config, workdir = self.config, self.workdir
    with contextlib.ExitStack() as stack:
      self.lock = stack.enter_context(WorkdirLock(workdir))
      self.checkpoints = stack.enter_context(
        Checkpoints(workdir / "checkpoints", keep_last=config.keep_last)
      )
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
      evaluation = None if is_evaluated else self._evaluate(state, step)
      return self._loop(state, step, batches) or evaluation

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
    evaluation = None
    stopwatch = Stopwatch()
    in_flight = collections.deque()
    while step < self.steps:
      batch = stopwatch.next(batches)
      state = self.program.train_step(state, shard_batch(batch, self.mesh))
      in_flight.append(self.copy(state.step))
      if len(in_flight) > _STEPS_IN_FLIGHT:
        jax.block_until_ready(in_flight.popleft())
      step += 1
      self.progress.advance()
      self.checkpoints.check()
      stopped_by = stop_requested(self.stopping, step)
      is_evaluation_due = self._is_evaluation_step(step)
      is_halting = is_evaluation_due or stopped_by is not None
      if is_halting or self._is_checkpoint_due(step):
        self._check_finite(state)
        with stopwatch.paused():
          self._save(state)
          if is_halting:
            self.checkpoints.wait()
      if self._is_logged(step):
        state = self._log(state, step, stopwatch)
      if stopped_by:
        self._stop(step, stopped_by)
      if is_evaluation_due:
        with stopwatch.paused():
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
      unknown = {"images_per_second": math.nan, "data_wait": math.nan}
      self.writer.write(step, "train", metrics | unknown)
    return dataclasses.replace(state, window=self.program.empty_window())

  def _log(
    self, state: TrainState, step: int, stopwatch: Stopwatch
  ) -> TrainState:
    """Logs a window of steps; returns the state with an empty window."""
    metrics = self._read_window(state, step)
    metrics |= stopwatch.read(metrics.pop("images"))
    self.writer.write(step, "train", metrics)
    self.progress.show(step, metrics)
    if not self.is_warned and metrics["data_wait"] > MOST_DATA_WAIT:
      warning = slow_data_warning(metrics["data_wait"], self.config.data)
      self.progress.say(warning)
      self.is_warned = True
    return dataclasses.replace(state, window=self.program.empty_window())

  def _save(self, state: TrainState) -> None:
    self.lock.check()
    self.checkpoints.save(state, self.experiment)
    self.saved_at = time.monotonic()

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
      return self.program.eval_step(weights, batch)

    found = evaluate(
      dataclasses.replace(self.program, eval_step=eval_step),
      {"ema": state.ema, "raw": state.weights},
      self.eval_source,
    )
    evaluation, raw = found["ema"].evaluation, found["raw"].evaluation
    self.writer.write(step, "evaluation", evaluation.values)
    self.writer.write(step, "evaluation_raw", raw.values)
    self.checkpoints.add_evaluation(step, evaluation)
    when = f"epoch {step / self.times.epoch:.6g}"
    self.progress.say(f"{when}: ema  {evaluation}\n{when}: raw  {raw}")
    return evaluation

  def _read_window(self, state: TrainState, step: int) -> dict[str, float]:
    self._check_finite(state)
    sums = {k: float(v) for k, v in jax.device_get(state.window).items()}
    # Optax passes Python scalars to JAX, which a transfer guard may forbid.
    with jax.transfer_guard("allow"):
      learning_rate = float(jnp.asarray(self.program.schedule(step - 1)))
    return {
      "loss": sums["loss"] / sums["steps"],
      **self.program.task.logged(sums),
      "grad_norm": sums["grad_norm"] / sums["steps"],
      "learning_rate": learning_rate,
      "images": sums["images"],
    }

  def _check_finite(self, state: TrainState) -> None:
    bad_step = int(jax.device_get(state.bad_step))
    if bad_step >= 0:
      raise NonFiniteError(
        f"the loss or the gradient of step {bad_step} is not finite; the"
        f" checkpoints in {self.workdir} are from earlier steps: lower"
        " config.optimizer.learning_rate or raise its warmup"
      )
