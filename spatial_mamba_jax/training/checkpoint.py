"""Checkpoints: the newest few and the best, saved in the background."""

import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import orbax.checkpoint as ocp

from spatial_mamba_jax.errors import UserError, reason, say
from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.paths import local_path, make_directory
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.training.checkpoint_arrays import (
  check_model,
  check_size,
  on_one_device,
)
from spatial_mamba_jax.training.checkpoint_files import CheckpointFiles, is_step
from spatial_mamba_jax.training.checkpoint_items import (
  Items,
  cause,
  make_checkpointer,
  restore_like,
  without_ema,
)
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.processes import (
  from_first_process,
  in_all_processes,
)
from spatial_mamba_jax.training.save_clock import Save, SaveClock
from spatial_mamba_jax.training.state import TrainState


class RemovedError(TrainingError):
  """The run removed a checkpoint before it could be read."""


class SaveError(TrainingError):
  """A checkpoint could not be saved. Earlier checkpoints are unchanged."""

  status = 1  # The exit status of the command.


class Checkpoints:
  """The checkpoints of one run, by step.

  Each checkpoint is a directory named by its step. Its items are "ema", the
  moving average of the weights; "state", the rest of the training state;
  "experiment"; "metrics", once it is evaluated; and `digests.json`, the digests
  of all files. A checkpoint that a killed run left incomplete is ignored.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep_last: int = 2,
    create: bool = True,
    per_process: bool = False,
  ):
    """Opens a directory.

    Args:
      directory: the directory, which contains nothing but checkpoints.
      keep_last: how many of the newest checkpoints to keep.
      create: whether to create the directory and to remove incomplete
        checkpoints. Readers set it to False.
      per_process: whether `directory` is of this process alone, which saves
        there what its devices hold. Checkpoints that are not whole in every
        process are removed, so all processes have the same ones.

    Raises:
      TrainingError: the directory cannot be written.
    """
    self._files = CheckpointFiles(directory)
    self._keep_last = keep_last
    self._saving: int | None = None
    self._is_owner = per_process or jax.process_index() == 0
    self._other_remedy = (
      ", or without config.local_checkpoint_dir" if per_process else ""
    )
    if create and self._is_owner:
      try:
        make_directory(directory)
        self._files.clear_partial()
      except OSError as error:
        raise TrainingError(
          f"cannot write to {directory}: {reason(error, directory)}"
        ) from error
    if per_process:
      self._keep_those_of_all_processes()
    self._clock = SaveClock()
    self._checkpointer = make_checkpointer(
      self._clock.written, per_process=per_process
    )

  def _keep_those_of_all_processes(self) -> None:
    whole = in_all_processes(self._files.steps_with_digests())
    if others := sorted(set(self.steps()) - whole):
      say(
        f"{self._files.root}: removing step {', '.join(map(str, others))},"
        " damaged or not whole in every process"
      )
      self._files.remove(others)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: object, *error: object) -> None:
    if kind is None:
      self.wait()
      self._checkpointer.close()
    else:
      with suppress(Exception):  # The first error is reported.
        self._checkpointer.close()

  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints in ascending order."""
    return self._files.steps()

  def is_evaluated(self, step: int) -> bool:
    """Whether `add_evaluation` was called for a checkpoint."""
    return from_first_process(lambda: self._files.score(step) is not None)

  def newest(self) -> int | None:
    """Returns the step of the newest undamaged checkpoint.

    One line on standard error names the damaged checkpoints that were skipped.

    Returns:
      The step, the same in every process; None where there is no checkpoint.

    Raises:
      TrainingError: all checkpoints are damaged.
    """
    return from_first_process(
      lambda: self._files.first_whole(self.steps()[::-1])
    )

  def set_aside_after(self, step: int) -> None:
    """Renames newer checkpoints, so that their steps can be saved again."""
    from_first_process(lambda: self._files.set_aside_after(step))

  def best(self, among: Sequence[int] | None = None) -> int | None:
    """Returns the step with the best score; the newest if none is evaluated.

    One line on standard error names the damaged checkpoints that were skipped.

    Args:
      among: the steps to choose from; None for all.

    Returns:
      The step, the same in every process; None where there is no checkpoint.

    Raises:
      TrainingError: all checkpoints are damaged.
    """
    return from_first_process(
      lambda: self._files.first_whole(
        [
          step
          for step in self._files.by_score()
          if among is None or step in among
        ]
      )
    )

  def save(
    self, state: TrainState, experiment: dict[str, Any], *, wait: bool = False
  ) -> None:
    """Starts to save a state; returns once the state may be changed.

    A step that is already saved is skipped.

    Args:
      state: the training state.
      experiment: the config and whatever else a resumed run may not change; see
        `experiment.describe`. It must be serialisable as JSON.
      wait: whether to return only when the checkpoint is on disk.

    Raises:
      SaveError: this checkpoint, or the previous one, could not be written.
    """
    self._save(
      int(jax.device_get(state.step)),
      ema=ocp.args.PyTreeSave(state.ema),
      state=ocp.args.PyTreeSave(without_ema(state)),
      experiment=ocp.args.JsonSave(experiment),
    )
    if wait:
      self.wait()

  def save_weights(self, step: int, weights: Weights) -> None:
    """Saves weights without a training state, for evaluation only."""
    self._save(step, ema=ocp.args.PyTreeSave(weights))

  def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
    """Adds an evaluation, whose score ranks the checkpoint.

    Raises:
      SaveError: the checkpoint could not be written.
    """
    self.wait()
    if self._is_owner:
      metrics = {**evaluation.to_json(), "score": evaluation.score}
      try:
        self._files.add_metrics(step, metrics)
      except Exception as error:
        raise SaveError(
          f"the evaluation of step {step} cannot be added to its checkpoint in"
          f" {self._files.root}: {cause(error)}; the same command resumes once"
          " it can be written"
        ) from error
      self._files.prune(self._keep_last)

  def check(self) -> None:
    """Raises a SaveError if a save in the background has failed."""
    if self._saving is not None:
      with self._reporting_failures(self._saving):
        self._checkpointer.check_for_errors()

  def wait(self) -> None:
    """Waits until every checkpoint is on disk.

    Raises:
      SaveError: a checkpoint could not be written.
    """
    self._finish_save()

  def _finish_save(self) -> None:
    if self._saving is not None:
      with self._reporting_failures(self._saving):
        self._checkpointer.wait_until_finished()
      self._saving = None
      if self._is_owner:
        self._files.prune(self._keep_last)

  def is_writing(self) -> bool:
    """Whether a save is under way in the background, in the first process."""
    return from_first_process(lambda: self._clock.is_writing)

  def finished_save(self) -> Save | None:
    """Returns the cost of a save that has finished; once for each save.

    It is known in the first process alone.
    """
    return self._clock.take()

  def experiment(self, step: int) -> dict[str, Any]:
    """Returns the experiment that was passed to `save`.

    Raises:
      TrainingError: the checkpoint holds only weights.
    """
    if not self._files.path(step, "state").is_dir():
      raise TrainingError(
        f"{self._files.root} step {step} holds only weights, so there is no run"
        " to resume: choose another workdir"
      )
    return self._restore(step, experiment=ocp.args.JsonRestore())["experiment"]

  def evaluation(self, step: int) -> dict[str, Any] | None:
    """Returns the results of an evaluation; None where there was none."""
    return self._files.metrics(step)

  def restore_state(self, step: int, like: TrainState) -> TrainState:
    """Restores a training state.

    Args:
      step: the step of the checkpoint.
      like: shapes, types and shardings; no arrays are needed.

    Raises:
      TrainingError: the checkpoint is of another model, or damaged.
    """
    self._check_model(step, like.ema)
    items = self._restore(
      step,
      ema=restore_like(like.ema),
      state=restore_like(without_ema(like)),
    )
    state = TrainState(ema=items["ema"], **items["state"])
    if (found := int(jax.device_get(state.step))) != step:
      raise TrainingError(
        f"{self._files.path(step)} holds step {found}: remove it"
      )
    return state

  def restore_weights(
    self, step: int, like: Weights | None = None
  ) -> dict[str, Weights]:
    """Restores the weights of a checkpoint.

    Args:
      step: the step of the checkpoint.
      like: shapes, types and shardings. With None, weights of any model are
        restored to one device.

    Returns:
      "ema", the moving average, and "raw", the weights themselves. A checkpoint
      from `save_weights` has "ema" only.

    Raises:
      TrainingError: the checkpoint is of another model, or damaged.
    """
    if like is None:
      like = on_one_device(self._shapes(step))
    else:
      self._check_model(step, like)
    items: dict[str, Any] = {"ema": restore_like(like)}
    if self._files.path(step, "state").is_dir():
      items["state"] = restore_like({"weights": like}, partial_restore=True)
    found = self._restore(step, **items)
    weights = {"ema": found["ema"]}
    if "state" in items:
      weights["raw"] = found["state"]["weights"]
    return weights

  def _save(self, step: int, **items: Any) -> None:
    self._clock.start()
    self._finish_save()
    if from_first_process(lambda: step in self.steps()):
      return
    self._saving = step
    with self._reporting_failures(step):
      self._checkpointer.save(self._files.path(step), args=Items(**items))
    self._clock.returned(step)

  @contextmanager
  def _reporting_failures(self, step: int) -> Iterator[None]:
    """Turns whatever a save raises into a SaveError."""
    try:
      yield
    except Exception as error:
      self._saving = None
      # Other processes may still write there; the next run clears it.
      if jax.process_count() == 1:
        self._files.clear_partial(step)
      steps = self.steps()
      newest = (
        f"the newest is of step {steps[-1]}" if steps else "there is none"
      )
      raise SaveError(
        f"the checkpoint of step {step} cannot be saved in {self._files.root}:"
        f" {cause(error)}; {newest}; the same command resumes once it can be"
        f" written{self._other_remedy}"
      ) from error

  def _restore(self, step: int, **items: Any) -> Any:
    with self._reporting_damage(step):
      return self._checkpointer.restore(
        self._files.path(step), args=Items(**items)
      )

  @contextmanager
  def _reporting_damage(self, step: int) -> Iterator[None]:
    """Turns whatever reading a checkpoint raises into a TrainingError."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      if not self._files.path(step).is_dir():
        raise RemovedError(
          f"{self._files.path(step)} was removed while it was read: try again"
        ) from error
      # Orbax and TensorStore raise many types of errors for damaged files.
      raise TrainingError(
        f"{self._files.path(step)} is damaged ({cause(error)}): remove it to"
        " use an earlier one"
      ) from error

  def _shapes(self, step: int) -> Any:
    """Returns the tree of the moving average, with shapes for arrays."""
    with self._reporting_damage(step):
      items = self._checkpointer.metadata(self._files.path(step)).item_metadata
      if not items or items.get("ema") is None:
        raise TrainingError(
          f"{self._files.path(step)} is not a checkpoint of this project"
        )
      shapes = items["ema"].tree
      check_size(self._files.path(step), shapes)
      on_one_device(shapes)  # Raises an error where the tree is not `Weights`.
      return shapes

  def _check_model(self, step: int, like: Weights) -> None:
    check_model(f"{self._files.root} step {step}", self._shapes(step), like)


@contextmanager
def open_checkpoint(path: pathlib.Path) -> Iterator[tuple[Checkpoints, int]]:
  """Opens one checkpoint, or the best undamaged one of a directory.

  Args:
    path: a working directory, its `checkpoints`, or one checkpoint in there.

  Yields:
    The checkpoints and the step to read.

  Raises:
    TrainingError: there is no checkpoint.
  """
  path = local_path(path)
  if (path / "checkpoints").is_dir():
    path = path / "checkpoints"
  is_one = is_step(path.name)
  directory = path.parent if is_one else path
  if not directory.is_dir():
    raise TrainingError(
      f"{path} does not exist: train first, or correct the path"
    )
  with Checkpoints(directory, create=False) as checkpoints:
    step = checkpoints.best([int(path.name)] if is_one else None)
    if step is None:
      raise RemovedError(f"{path} holds no complete checkpoint")
    yield checkpoints, step
