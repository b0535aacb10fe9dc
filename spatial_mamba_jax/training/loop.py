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
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_mamba_jax.data import (
  Batches,
  Source,
  open_source,
  train_batches,
)
from spatial_mamba_jax.errors import reason, say, tell
from spatial_mamba_jax.paths import local_path, make_directory
from spatial_mamba_jax.training import provenance
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import (
  TrainConfig,
  TrainingError,
  check_same_experiment,
  to_dict,
)
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.evaluation import (
  Evaluation,
  Predictions,
  predict,
)
from spatial_mamba_jax.training.metrics import (
  MOST_DATA_WAIT,
  MetricWriter,
  Progress,
  Stopwatch,
  slow_data_warning,
)
from spatial_mamba_jax.training.optimizer import make_optimizer, make_schedule
from spatial_mamba_jax.training.preprocess import make_preprocess
from spatial_mamba_jax.training.processes import from_first_process
from spatial_mamba_jax.training.sharding import (
  make_mesh,
  replicated,
  shard_batch,
)
from spatial_mamba_jax.training.state import (
  PureModel,
  TrainState,
  create_state,
  empty_window,
  state_shapes,
)
from spatial_mamba_jax.training.step import make_eval_step, make_train_step
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


def evaluate_checkpoint(
  config: TrainConfig,
  path: str | os.PathLike[str],
  output_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Evaluation]:
  """Evaluates the weights in a checkpoint, and their moving average.

  Args:
    config: the experiment.
    path: as `load_weights` takes it.
    output_dir: where to write each image's and class's predictions, if
      anywhere; see `prediction_files`.

  Returns:
    The evaluations of "ema", the moving average, and "raw", the weights, as
    far as they are there.

  Raises:
    TrainingError, DataError: something is wrong with the config, the data, or
      what `path` holds.
  """
  config.validate()
  write = (
    _prediction_writer(local_path(output_dir, "output_dir"))
    if output_dir
    else None
  )
  mesh = make_mesh()
  check_batch_sizes(config, mesh)
  source = open_checked_source(config, "validation")
  architecture = config.model.build()
  model = PureModel(architecture)
  shapes = _placed(model.shapes, mesh)
  weights = load_weights(local_path(path), architecture, shapes)
  with jax.set_mesh(mesh):  # Kernels are split over it.
    predictions = predict(
      jax.jit(make_eval_step(model), out_shardings=replicated(mesh)),
      weights,
      source,
      config.data,
      batch_size=config.evaluation_batch_size,
      mesh=mesh,
    )
  if write and not jax.process_index():
    write(predictions, source)
  return {name: each.evaluation() for name, each in predictions.items()}


def _prediction_writer(
  directory: pathlib.Path,
) -> Callable[[dict[str, Predictions], Source], None]:
  """Fails now if it must, and not after a long evaluation."""
  from spatial_mamba_jax.training.prediction_files import write_predictions

  try:
    make_directory(directory)
  except OSError as error:
    raise TrainingError(
      f"cannot write to {directory}: {reason(error, directory)}"
    ) from error
  return partial(write_predictions, directory)


def _placed(shapes: Any, mesh: Mesh) -> Any:
  """The same shapes, to live on every device of the mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
    shapes,
  )


class _Run:
  """What the parts of a run share."""

  def __init__(self, config: TrainConfig, workdir: pathlib.Path):
    self.config, self.workdir = config, workdir
    self.mesh = make_mesh()
    check_batch_sizes(config, self.mesh)
    self.train_source = open_checked_source(config, "train")
    self.eval_source = open_checked_source(config, "validation")
    self.epoch_steps, self.steps = config.count_steps(len(self.train_source))
    self.experiment = {
      **to_dict(config),
      "training_images": len(self.train_source),
    }
    self.schedule = make_schedule(
      config.optimizer,
      batch_size=config.batch_size,
      epochs=config.epochs,
      epoch_steps=self.epoch_steps,
    )
    self.model = PureModel(
      config.model.build(), linear_probe=config.linear_probe
    )
    self.optimizer = make_optimizer(
      config.optimizer, self.schedule, self.model.decays, self.model.layers
    )
    step = make_train_step(
      self.model,
      self.optimizer,
      make_preprocess(config),
      config,
      epoch_steps=self.epoch_steps,
    )
    on_all = replicated(self.mesh)
    self.train_step = jax.jit(step, donate_argnums=0, out_shardings=on_all)
    self.eval_step = jax.jit(make_eval_step(self.model), out_shardings=on_all)
    # Jitted, because `device_put` cannot reach other processes' devices.
    self.empty_window = jax.jit(empty_window, out_shardings=on_all)
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
        step=step, steps=self.steps, epoch_steps=self.epoch_steps
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
    description = {
      "config": to_dict(self.config),
      "epoch_steps": self.epoch_steps,
      "versions": provenance.versions(_PACKAGES),
      "commit": provenance.commit(),
      "devices": [device.device_kind for device in jax.devices()],
    }
    text = json.dumps(description, indent=2, allow_nan=False)
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
    like = _placed(state_shapes(self.model, self.optimizer), self.mesh)
    if not jax.process_index():
      say(f"resuming {self.workdir} after step {step}")
    return self.checkpoints.restore_state(step, like)

  def _batches(self, step: int) -> Batches:
    return train_batches(
      self.train_source,
      self.config.data,
      batch_size=self.config.batch_size // jax.process_count(),
      seed=self.config.seed,
      start_step=step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _fresh_state(self) -> TrainState:
    config, on_all = self.config, replicated(self.mesh)
    state = create_state(self.model, self.optimizer, config.seed, on_all)
    if not config.init_from:
      return state
    weights, said = start_from(
      local_path(config.init_from, "config.init_from"),
      config.model.build(),
      state.weights,
    )
    if not jax.process_index():
      say(said)
    # A copy of its own, because a step takes the state's memory.
    average = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=on_all)
    return dataclasses.replace(state, weights=weights, ema=average(weights))

  def _loop(
    self, state: TrainState, step: int, batches: Batches
  ) -> Evaluation | None:
    """Trains to the last step; returns the last evaluation."""
    evaluation = None
    stopwatch = Stopwatch()
    in_flight = collections.deque()
    while step < self.steps:
      batch = stopwatch.next(batches)
      state = self.train_step(state, shard_batch(batch, self.mesh))
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
    return step % self.config.log_every == 0 or step == self.steps

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
    return dataclasses.replace(state, window=self.empty_window())

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
    return dataclasses.replace(state, window=self.empty_window())

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
    epoch, rest = divmod(step, self.epoch_steps)
    is_due = epoch % self.config.evaluate_every == 0 or step == self.steps
    return step > 0 and not rest and is_due

  def _is_checkpoint_due(self, step: int) -> bool:
    """Whether `config.checkpoint_every` asks for a checkpoint."""
    interval = self.config.checkpoint_interval()
    if interval is None:
      return False
    if interval.unit == "steps":
      return step % interval.count == 0
    # Clocks differ: one process decides, and not so often that all wait for it.
    if jax.process_count() > 1 and step % self.config.log_every:
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
      return self.eval_step(weights, batch)

    predictions = predict(
      eval_step,
      {"ema": state.ema, "raw": state.weights},
      self.eval_source,
      self.config.data,
      batch_size=self.config.evaluation_batch_size,
      mesh=self.mesh,
    )
    evaluation = predictions["ema"].evaluation()
    raw = predictions["raw"].evaluation()
    self.writer.write(step, "evaluation", dataclasses.asdict(evaluation))
    self.writer.write(step, "evaluation_raw", dataclasses.asdict(raw))
    self.checkpoints.add_evaluation(step, evaluation)
    epoch = f"epoch {step // self.epoch_steps}"
    self.progress.say(f"{epoch}: ema  {evaluation}\n{epoch}: raw  {raw}")
    return evaluation

  def _read_window(self, state: TrainState, step: int) -> dict[str, float]:
    self._check_finite(state)
    sums = {k: float(v) for k, v in jax.device_get(state.window).items()}
    # Optax computes with Python's numbers, which JAX may be told to refuse.
    with jax.transfer_guard("allow"):
      learning_rate = float(jnp.asarray(self.schedule(step - 1)))
    return {
      "loss": sums["loss"] / sums["steps"],
      "accuracy": sums["correct"] / sums["images"],
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
        " config.optimizer.learning_rate or raise warmup_epochs"
      )


def check_batch_sizes(config: TrainConfig, mesh: Mesh) -> None:
  """Raises a TrainingError unless the devices share batches evenly."""
  part = config.batch_size // config.accumulation_steps
  for field, size in (
    ("batch_size / accumulation_steps", part),
    ("evaluation_batch_size", config.evaluation_batch_size),
  ):
    if size % mesh.size:
      raise TrainingError(
        f"config.{field} = {size} must be a multiple of the {mesh.size} devices"
      )


def open_checked_source(config: TrainConfig, split: str) -> Source:
  """The images of a split, which must have the model's number of classes.

  Raises:
    TrainingError: it has not.
    DataError: there are no such images.
  """
  source = open_source(config.data, split)
  if source.num_classes != config.model.num_classes:
    raise TrainingError(
      f"{config.data.name} has {source.num_classes} classes and the model"
      f" {config.model.num_classes}: set"
      f" --config.model.num_classes={source.num_classes}"
    )
  return source
