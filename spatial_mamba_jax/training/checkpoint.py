"""Checkpoints: the newest few and the best, written while training goes on."""

import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from spatial_mamba_jax.errors import UserError, one_line, reason
from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.paths import local_path, make_directory
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.training.checkpoint_files import CheckpointFiles, is_step
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.digests import write_digests
from spatial_mamba_jax.training.processes import from_first_process
from spatial_mamba_jax.training.state import TrainState

# Arrays may take so many times their bytes on disk, and so many bytes beyond:
# weights hardly compress, and damaged metadata can ask for any amount.
_MOST_EXPANSION = 100
_ALWAYS_ALLOWED = 2**26
# Of parameters and statistics.
_TYPES = (jnp.float32, jnp.float64, jnp.int32)


class RemovedError(TrainingError):
  """A checkpoint was removed by its run before it could be read."""


class SaveError(TrainingError):
  """A checkpoint could not be saved; those before it are as they were."""

  status = 1


class _Handler(ocp.CompositeCheckpointHandler):
  """Adds the digests of all files before a checkpoint gets its name."""

  def finalize(self, directory: Any) -> None:
    super().finalize(directory)
    write_digests(pathlib.Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
  """The items of a checkpoint, {name: arguments of their handlers}."""


class Checkpoints:
  """The checkpoints of one run, by step.

  Each is a directory named by its step. It holds the moving average of the
  weights by itself, the rest of the training state, the experiment, later what
  an evaluation found, and the digests of all these files. A checkpoint that is
  half written when a run is killed is never taken for one.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep_last: int = 2,
    create: bool = True,
  ):
    """Opens a directory; `create` makes it, or clears it of partial saves."""
    self._files = CheckpointFiles(directory)
    self._keep_last = keep_last
    self._saving: int | None = None
    self._is_first = jax.process_index() == 0
    if create and self._is_first:
      try:
        make_directory(directory)
        self._files.clear_partial()
      except OSError as error:
        raise TrainingError(
          f"cannot write to {directory}: {reason(error, directory)}"
        ) from error
    self._checkpointer = ocp.AsyncCheckpointer(
      _Handler(
        ema=ocp.StandardCheckpointHandler(),
        # Evaluation reads the weights alone of it.
        state=ocp.PyTreeCheckpointHandler(),
        experiment=ocp.JsonCheckpointHandler(),
        # Written by `CheckpointFiles`, but orbax warns of items that it does
        # not know.
        metrics=ocp.JsonCheckpointHandler(),
      ),
      # Otherwise, where a directory cannot be made, threads wait for it for
      # minutes, and the process for them.
      async_options=ocp.options.AsyncOptions(
        create_directories_asynchronously=False
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: object, *error: object) -> None:
    if kind is None:
      self.wait()
      self._checkpointer.close()
    else:
      with suppress(Exception):  # What ended the run is what is told.
        self._checkpointer.close()

  def steps(self) -> list[int]:
    """The steps of all checkpoints, in rising order."""
    return self._files.steps()

  def is_evaluated(self, step: int) -> bool:
    """Whether `add_evaluation` was called for a checkpoint."""
    return from_first_process(lambda: self._files.score(step) is not None)

  def newest(self) -> int | None:
    """The step of the newest undamaged checkpoint.

    One line on standard error names those that were passed over.

    Returns:
      The step, the same in every process; None where there is no checkpoint.

    Raises:
      TrainingError: all are damaged.
    """
    return from_first_process(
      lambda: self._files.first_whole(self.steps()[::-1])
    )

  def set_aside_after(self, step: int) -> None:
    """Renames newer checkpoints, so that their steps can be saved again."""
    from_first_process(lambda: self._files.set_aside_after(step))

  def best(self, among: Sequence[int] | None = None) -> int | None:
    """The step of the highest score; the newest where none was evaluated.

    Args:
      among: the steps to choose from; None for all.

    Returns, Raises: as `newest`.
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

  def save(self, state: TrainState, experiment: dict[str, Any]) -> None:
    """Starts to save; returns once the state may change again.

    Args:
      state: the state after some step. A step that is saved already is not
        saved again.
      experiment: the config and what else a run may not change, as JSON.

    Raises:
      SaveError: this checkpoint, or the one before, could not be written.
    """
    self._save(
      int(jax.device_get(state.step)),
      ema=ocp.args.StandardSave(state.ema),
      state=ocp.args.PyTreeSave(_without_ema(state)),
      experiment=ocp.args.JsonSave(experiment),
    )

  def save_weights(self, step: int, weights: Weights) -> None:
    """Saves weights alone, which can be evaluated, but not trained on."""
    self._save(step, ema=ocp.args.StandardSave(weights))

  def add_evaluation(self, step: int, evaluation: Evaluation) -> None:
    """Adds to a checkpoint what decides which is the best.

    Raises:
      SaveError: the checkpoint could not be written.
    """
    self.wait()
    if self._is_first:
      metrics = {**evaluation.to_json(), "score": evaluation.score}
      try:
        self._files.add_metrics(step, metrics)
      except Exception as error:
        raise SaveError(
          f"the evaluation of step {step} cannot be added to its checkpoint in"
          f" {self._files.root}: {_cause(error)}; once it can be written, the"
          " same command resumes"
        ) from error
      self._files.prune(self._keep_last)

  def check(self) -> None:
    """Raises a SaveError if a save has failed in the background."""
    if self._saving is not None:
      with self._failures_told(self._saving):
        self._checkpointer.check_for_errors()

  def wait(self) -> None:
    """Returns once every checkpoint is on disk.

    Raises:
      SaveError: one could not be written.
    """
    if self._saving is not None:
      with self._failures_told(self._saving):
        self._checkpointer.wait_until_finished()
      self._saving = None
      if self._is_first:
        self._files.prune(self._keep_last)

  def experiment(self, step: int) -> dict[str, Any]:
    """What `save` was told of the experiment.

    Raises:
      TrainingError: the checkpoint is of weights alone.
    """
    if not self._files.path(step, "state").is_dir():
      raise TrainingError(
        f"{self._files.root} step {step} holds weights alone, and no run to"
        " resume: choose another workdir"
      )
    return self._restore(step, experiment=ocp.args.JsonRestore())["experiment"]

  def restore_state(self, step: int, like: TrainState) -> TrainState:
    """The whole state, on the shardings of `like` (shapes are enough).

    Raises:
      TrainingError: the checkpoint is of another model, or damaged.
    """
    self._check_model(step, like.ema)
    items = self._restore(
      step,
      ema=ocp.args.StandardRestore(like.ema),
      state=_restore_like(_without_ema(like)),
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
    """The moving average, "ema", and the weights themselves, "raw".

    Args:
      step: of the checkpoint. One of weights alone has no "raw".
      like: shapes and shardings; without it, the weights of whatever model, on
        one device.

    Raises:
      TrainingError: the checkpoint is of another model, or damaged.
    """
    if like is None:
      like = _on_one_device(self._shapes(step))
    else:
      self._check_model(step, like)
    items: dict[str, Any] = {"ema": ocp.args.StandardRestore(like)}
    if self._files.path(step, "state").is_dir():
      items["state"] = _restore_like({"weights": like}, partial_restore=True)
    found = self._restore(step, **items)
    weights = {"ema": found["ema"]}
    if "state" in items:
      weights["raw"] = found["state"]["weights"]
    return weights

  def _save(self, step: int, **items: Any) -> None:
    self.wait()
    if from_first_process(lambda: step in self.steps()):
      return
    self._saving = step
    with self._failures_told(step):
      self._checkpointer.save(self._files.path(step), args=_Items(**items))

  @contextmanager
  def _failures_told(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      self._saving = None
      self._files.clear_partial(step)
      newest = self.steps()[-1:]
      raise SaveError(
        f"the checkpoint of step {step} cannot be saved in {self._files.root}:"
        f" {_cause(error)}; the newest there is"
        f" {f'of step {newest[0]}' if newest else 'none'}; once it can be"
        " written, the same command resumes"
      ) from error

  def _restore(self, step: int, **items: Any) -> Any:
    with self._damage_told(step):
      return self._checkpointer.restore(
        self._files.path(step), args=_Items(**items)
      )

  @contextmanager
  def _damage_told(self, step: int) -> Iterator[None]:
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      if not self._files.path(step).is_dir():
        raise RemovedError(
          f"{self._files.path(step)} was removed meanwhile: try again"
        ) from error
      # Orbax and TensorStore raise nearly anything of damaged files.
      raise TrainingError(
        f"{self._files.path(step)} is damaged ({_cause(error)}): remove it to"
        " use an earlier one"
      ) from error

  def _shapes(self, step: int) -> Any:
    """The moving average's tree, of what has a shape and a type."""
    with self._damage_told(step):
      items = self._checkpointer.metadata(self._files.path(step)).item_metadata
      if not items or items.get("ema") is None:
        raise TrainingError(
          f"{self._files.path(step)} is no checkpoint of this project"
        )
      shapes = items["ema"].tree
      self._check_size(step, shapes)
      _on_one_device(shapes)  # Raises where it is another tree.
      return shapes

  def _check_model(self, step: int, like: Weights) -> None:
    saved, wanted = _named_shapes(self._shapes(step)), _named_shapes(like)
    differing = [
      f"{name} is {saved.get(name, 'missing')} there and"
      f" {wanted.get(name, 'missing')} here"
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name) != wanted.get(name)
    ]
    if differing:
      raise TrainingError(
        f"{self._files.root} step {step} holds another model than"
        f" config.model asks for: {'; '.join(differing[:3])}"
      )

  def _check_size(self, step: int, saved: Any) -> None:
    """Refuses arrays that the files cannot hold, before memory is taken."""
    path = self._files.path(step)
    stored = sum(x.stat().st_size for x in path.rglob("*") if x.is_file())
    size = 0
    for leaf in jax.tree.leaves(saved):
      if leaf.dtype not in _TYPES:
        raise TrainingError(f"{path} has an array of type {leaf.dtype}")
      chunk = getattr(leaf.storage, "chunk_shape", None) or ()
      elements = max(math.prod(leaf.shape), math.prod(chunk))
      size += elements * leaf.dtype.itemsize
    if size > _ALWAYS_ALLOWED + _MOST_EXPANSION * stored:
      raise TrainingError(
        f"{path} has {stored} bytes, and claims to hold arrays of {size}"
      )


@contextmanager
def open_checkpoint(path: pathlib.Path) -> Iterator[tuple[Checkpoints, int]]:
  """Opens one checkpoint, or the best of a directory, with its step.

  A damaged one is passed over for the next best.

  Args:
    path: a working directory, its `checkpoints`, or one of these, a directory
      named by its step.

  Raises:
    TrainingError: there is no checkpoint.
  """
  path = local_path(path)
  if (path / "checkpoints").is_dir():
    path = path / "checkpoints"
  is_one = is_step(path.name)
  directory = path.parent if is_one else path
  if not directory.is_dir():
    raise TrainingError(f"{path} does not exist: train first, or mend the path")
  with Checkpoints(directory, create=False) as checkpoints:
    step = checkpoints.best([int(path.name)] if is_one else None)
    if step is None:
      raise RemovedError(f"{path} holds no complete checkpoint")
    yield checkpoints, step


def _cause(error: Exception) -> str:
  """What the operating system says, or how a long message begins."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = one_line(error)
  # TensorStore's: [os_error_code='28'], earlier [OS error 28: ...].
  if number := re.search(r"os.error\D{0,8}(\d+)", text, re.IGNORECASE):
    return os.strerror(int(number[1]))
  return text if len(text) <= 200 else f"{text[:197]}..."


def _on_one_device(saved: Any) -> Weights:
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    Weights(**saved),
  )


def _restore_like(like: Any, **options: Any) -> ocp.args.PyTreeRestore:
  args = ocp.checkpoint_utils.construct_restore_args(like)
  return ocp.args.PyTreeRestore(like, restore_args=args, **options)


def _without_ema(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "weights": state.weights,
    "opt_state": state.opt_state,
    "window": state.window,
    "bad_step": state.bad_step,
  }


def _named_shapes(tree: Any) -> dict[str, list[int]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    str(getattr(path[-1], "key", path[-1])): list(leaf.shape)
    for path, leaf in leaves
  }
