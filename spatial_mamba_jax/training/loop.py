"""A run from its first step, or from where it was stopped, to its last."""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spatial_mamba_jax.data import (
  Source,
  open_source,
  train_batches,
)
from spatial_mamba_jax.training import provenance
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import (
  TrainConfig,
  TrainingError,
  check_same_experiment,
  to_dict,
)
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

# Enough that the device never waits for the host. Were there no end to it, the
# host would take batches as fast as they come, and always wait for more.
_STEPS_IN_FLIGHT = 2


class NonFiniteError(Exception):
  """The loss or the gradient was not finite."""

  status = 1  # The exit status of a command that it ends.


def train(config: TrainConfig, workdir: pathlib.Path) -> Evaluation | None:
  """Trains, resuming where `workdir` holds a checkpoint.

  Args:
    config: the experiment.
    workdir: where checkpoints and logs are kept.

  Returns:
    The evaluation after the last step; None where the run had ended before.

  Raises:
    TrainingError, DataError: something is wrong with the config, the data, or
      what `workdir` holds.
    StoppedError: on SIGTERM or Ctrl-C, after saving.
    NonFiniteError: the run diverged; its last checkpoint is from before.
  """
  config.validate()
  return _Run(config, workdir).run()


def evaluate_checkpoint(
  config: TrainConfig,
  path: pathlib.Path,
  output_dir: pathlib.Path | None = None,
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
  write = _prediction_writer(output_dir) if output_dir else None
  mesh = make_mesh()
  check_batch_sizes(config, mesh)
  source = open_checked_source(config, "validation")
  architecture = config.model.build()
  model = PureModel(architecture)
  weights = load_weights(path, architecture, _placed(model.shapes, mesh))
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
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise TrainingError(f"cannot write to {directory}: {error}") from error
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
    self.epoch_steps = len(self.train_source) // config.batch_size
    if not self.epoch_steps:
      raise TrainingError(
        f"config.batch_size={config.batch_size} is larger than the"
        f" {len(self.train_source)} training images"
      )
    self.steps = config.epochs * self.epoch_steps
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

  def run(self) -> Evaluation | None:
    config = self.config
    self.workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(
      self.workdir / "checkpoints", keep_last=config.keep_last
    ) as checkpoints:
      state = self._first_state(checkpoints)
      step = int(state.step)
      if step >= self.steps:
        print(f"{self.workdir}: all {self.steps} steps are done already")
        return None
      _describe_run(config, self.workdir, self.epoch_steps)
      progress = Progress(
        step=step, steps=self.steps, epoch_steps=self.epoch_steps
      )
      batches = train_batches(
        self.train_source,
        config.data,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        start_step=step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )
      writer = MetricWriter(self.workdir, resumed_step=step)
      # Kernels are split over the mesh in force.
      with (
        batches,
        writer,
        jax.set_mesh(self.mesh),
        stop_signals() as stopping,
      ):
        try:
          return self._loop(
            state, step, batches, checkpoints, writer, progress, stopping
          )
        finally:
          progress.close()

  def _first_state(self, checkpoints: Checkpoints) -> TrainState:
    step = checkpoints.latest_step()
    if step is None:
      return self._fresh_state()
    check_same_experiment(
      checkpoints.experiment(step), self.experiment, str(self.workdir)
    )
    like = _placed(state_shapes(self.model, self.optimizer), self.mesh)
    print(f"resuming {self.workdir} after step {step}", file=sys.stderr)
    return checkpoints.restore_state(step, like)

  def _fresh_state(self) -> TrainState:
    config, on_all = self.config, replicated(self.mesh)
    state = create_state(self.model, self.optimizer, config.seed, on_all)
    if not config.init_from:
      return state
    weights, said = start_from(
      pathlib.Path(config.init_from).absolute(),
      config.model.build(),
      state.weights,
    )
    if not jax.process_index():
      print(said, file=sys.stderr)
    # A copy of its own, because a step takes the state's memory.
    average = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=on_all)
    return dataclasses.replace(state, weights=weights, ema=average(weights))

  def _loop(
    self, state, step, batches, checkpoints, writer, progress, stopping
  ) -> Evaluation | None:
    config = self.config
    evaluation = None
    stopwatch = Stopwatch()
    in_flight = collections.deque()
    warned = False
    while step < self.steps:
      batch = stopwatch.next(batches)
      state = self.train_step(state, shard_batch(batch, self.mesh))
      in_flight.append(self.copy(state.step))
      if len(in_flight) > _STEPS_IN_FLIGHT:
        jax.block_until_ready(in_flight.popleft())
      step += 1
      progress.advance()
      stopped_by = stop_requested(stopping, step)
      if step % config.log_every == 0 or step == self.steps:
        metrics = self._read_window(state, step)
        metrics |= stopwatch.read(metrics.pop("images"))
        writer.write(step, "train", metrics)
        progress.show(step, metrics)
        if not warned and metrics["data_wait"] > MOST_DATA_WAIT:
          progress.say(slow_data_warning(metrics["data_wait"], config.data))
          warned = True
        state = dataclasses.replace(state, window=self.empty_window())
      if step % self.epoch_steps == 0 and self._is_evaluated(step):
        with stopwatch.paused():
          self._check_finite(state)
          evaluation, raw = self._evaluate(state)
          writer.write(step, "evaluation", dataclasses.asdict(evaluation))
          writer.write(step, "evaluation_raw", dataclasses.asdict(raw))
          epoch = f"epoch {step // self.epoch_steps}"
          progress.say(f"{epoch}: ema  {evaluation}\n{epoch}: raw  {raw}")
          checkpoints.save(state, self.experiment, evaluation)
      elif stopped_by:
        self._check_finite(state)
        checkpoints.save(state, self.experiment)
      if stopped_by and step < self.steps:
        checkpoints.wait()
        raise StoppedError(
          f"stopped by {stopped_by.name} after step {step}, which is saved;"
          " the same command resumes",
          stopped_by,
        )
    return evaluation

  def _is_evaluated(self, step: int) -> bool:
    epoch = step // self.epoch_steps
    return epoch % self.config.evaluate_every == 0 or step == self.steps

  def _evaluate(self, state: TrainState) -> tuple[Evaluation, Evaluation]:
    """Of the moving average, which decides the best, and of the weights."""
    predictions = predict(
      self.eval_step,
      {"ema": state.ema, "raw": state.weights},
      self.eval_source,
      self.config.data,
      batch_size=self.config.evaluation_batch_size,
      mesh=self.mesh,
    )
    return predictions["ema"].evaluation(), predictions["raw"].evaluation()

  def _read_window(self, state: TrainState, step: int) -> dict[str, float]:
    self._check_finite(state)
    sums = {k: float(v) for k, v in jax.device_get(state.window).items()}
    return {
      "loss": sums["loss"] / sums["steps"],
      "accuracy": sums["correct"] / sums["images"],
      "grad_norm": sums["grad_norm"] / sums["steps"],
      "learning_rate": float(jnp.asarray(self.schedule(step - 1))),
      "images": sums["images"],
    }

  def _check_finite(self, state: TrainState) -> None:
    bad_step = int(state.bad_step)
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


def _describe_run(
  config: TrainConfig, workdir: pathlib.Path, epoch_steps: int
) -> None:
  """Leaves a description beside the checkpoints."""
  if jax.process_index():
    return
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
  description = {
    "config": to_dict(config),
    "epoch_steps": epoch_steps,
    "versions": provenance.versions(packages),
    "commit": provenance.commit(),
    "devices": [device.device_kind for device in jax.devices()],
  }
  path = workdir / "run.json"
  path.write_text(json.dumps(description, indent=2) + "\n")
