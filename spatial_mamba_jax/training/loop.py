"""A run from its first step, or from where it was stopped, to its last."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import time
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from spatial_mamba_jax.data import Batches, train_batches
from spatial_mamba_jax.errors import reason, say, tell
from spatial_mamba_jax.paths import local_path, make_directory
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.training import provenance
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.evaluation import evaluate
from spatial_mamba_jax.training.experiment import (
  check_same_experiment,
  describe,
  to_dict,
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

# Steps dispatched ahead of the device. Without a bound the host would take
# batches as fast as they come, and always wait for more.
_STEPS_IN_FLIGHT = 2
# Packages whose versions `run.json` names.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


class NonFiniteError(Exception):
  """The loss or the gradient was not finite."""

  status = 1  # The exit status of a command that it ends.


def train(
  config: TrainConfig, workdir: str | os.PathLike[str]
) -> Evaluation | None:
  """Trains, resuming where `workdir` holds a checkpoint.

  Args:
    config: the experiment.
    workdir: where checkpoints and logs are kept.

  Returns:
    The evaluation after the last step; None where the run had ended before.

  Raises:
    TrainingError, DataError: something is wrong with the config, the data, or
      what `workdir` holds; or another run holds it.
    SaveError: a checkpoint could not be saved; those before it are whole.
    OSError: the log could not be written.
    StoppedError: on SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C, after saving.
    NonFiniteError: the run diverged; its last checkpoint is from before.
  """
  config.validate()
  return _Run(config, local_path(workdir, "workdir")).run()


class Evaluated(NamedTuple):
  """What `evaluate_checkpoint` returns.

  Attributes:
    step: of the checkpoint; None where the weights are a file's.
    evaluations: of "ema", the moving average, and "raw", the weights, as far as
      they are there.
  """

  step: int | None
  evaluations: dict[str, Evaluation]


def evaluate_checkpoint(
  config: TrainConfig,
  path: str | os.PathLike[str],
  output_dir: str | os.PathLike[str] | None = None,
) -> Evaluated:
  """Evaluates the weights in a checkpoint, and their moving average.

  Args:
    config: the experiment.
    path: as `load_weights` takes it.
    output_dir: where to write the predictions, if anywhere, in a directory for
      each set of weights; see `Meter.write` of the task.

  Raises:
    UserError: something is wrong with the config, the data, or what `path`
      holds.
  """
  config.validate()
  directory = local_path(output_dir, "output_dir") if output_dir else None
  if directory:
    _check_writable(directory)  # Before a long evaluation.
  mesh = make_mesh()
  program = make_evaluator(config, mesh)
  source = program.task.source("validation")
  step, weights = load_weights(
    local_path(path), program.model, program.weight_shapes
  )
  with jax.set_mesh(mesh):  # Kernels are split over it.
    found = evaluate(program, weights, source)
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


def _strict(tree: Any) -> Any:
  """The same with texts for what is not finite, which JSON has not."""
  if isinstance(tree, dict):
    return {name: _strict(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_strict(value) for value in tree]
  is_finite = not isinstance(tree, float) or math.isfinite(tree)
  return tree if is_finite else str(tree)


class _Run:
  """What the parts of a run share."""

  def __init__(self, config: TrainConfig, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.mesh = make_mesh()
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
        tell(f"{workdir}: all {self.steps} steps are done already")
        return None
      self._describe()
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
      # Kernels are split over the mesh in force.
      stack.enter_context(jax.set_mesh(self.mesh))
      self.stopping = stack.enter_context(stop_signals())
      state = self._finish_log(state, step)
      evaluation = None if is_evaluated else self._evaluate(state, step)
      return self._loop(state, step, batches) or evaluation

  def _describe(self) -> None:
    """Leaves a description beside the checkpoints."""
    if jax.process_index():
      return
    task = self.program.task
    description = {
      "config": to_dict(self.config),
      "epoch_steps": self.times.epoch,
      "steps": self.steps,
      "task": {
        "kind": self.config.task.kind,
        "score": task.score,
        "panels": [panel._asdict() for panel in task.panels],
        "columns": task.columns,
      },
      "versions": provenance.versions(_PACKAGES),
      "commit": provenance.commit(),
      "devices": [device.device_kind for device in jax.devices()],
    }
    text = json.dumps(_strict(description), indent=2, allow_nan=False)
    write_whole(self.workdir / "run.json", text + "\n")

  def _first_step(self) -> int:
    """The step of the checkpoint to go on from; 0 where there is none."""
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
    return self.checkpoints.restore_state(step, self.program.state_shapes)

  def _batches(self, step: int) -> Batches:
    return train_batches(
      self.train_source,
      self.config.data,
      batch_size=self.config.batch_size // jax.process_count(),
      seed=self.config.seed,
      start_step=step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      examples=self.program.task.examples(),
    )

  def _fresh_state(self) -> TrainState:
    state = self.program.fresh_state()
    if not self.config.init_from:
      return state
    weights, said = start_from(
      local_path(self.config.init_from, "config.init_from"),
      self.program.model,
      state.weights,
    )
    if not jax.process_index():
      say(said)
    # Memory of its own, because a step takes the state's.
    average = copied(weights, self.mesh)
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
    """Logs the window that a killed run had saved but not logged.

    The speed of these steps is not known.
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
    """Logs a window of steps; the state returned begins the next."""
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
    # Clocks differ: one process decides, and not so often that all wait for it.
    if jax.process_count() > 1 and step % self.times.log_every:
      return False
    minutes = 60 * interval.count
    return from_first_process(
      lambda: time.monotonic() - self.saved_at >= minutes
    )

  def _evaluate(self, state: TrainState, step: int) -> Evaluation:
    """Evaluates the weights, and their average, which ranks checkpoints."""

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
    # Optax computes with Python's numbers, which JAX may be told to refuse.
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
        f" checkpoints in {self.workdir} are from before: lower"
        " config.optimizer.learning_rate or raise its warmup"
      )
