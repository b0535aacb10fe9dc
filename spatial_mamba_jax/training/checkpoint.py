"""Checkpoints: the newest few and the best, written while training goes on."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.extend.backend import get_default_device
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as policies

from spatial_mamba_jax.models import SpatialMamba
from spatial_mamba_jax.training.config import ModelSection, TrainingError
from spatial_mamba_jax.training.evaluation import Evaluation
from spatial_mamba_jax.training.state import PureModel, TrainState, Weights


class Checkpoints:
  """The checkpoints of one run, by step.

  Each holds the moving average of the weights by itself, which is all that
  evaluation reads, the rest of the training state, and the experiment. One that
  is half written when a run is killed is never taken for a checkpoint.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    keep_last: int = 2,
    create: bool = True,
  ):
    """Opens a directory; `create` makes it, or clears it of partial saves."""
    self._directory = directory
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        create=create,
        cleanup_tmp_directories=create,
        # Not what decides which to keep, but metrics are written for it alone.
        best_fn=lambda metrics: metrics["top1"],
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep_last),
            policies.BestN(
              get_metric_fn=lambda metrics: metrics["top1"],
              n=1,
              keep_checkpoints_without_metrics=False,
            ),
          ]
        ),
      ),
      item_handlers={
        "ema": ocp.StandardCheckpointHandler(),
        "state": ocp.StandardCheckpointHandler(),
        "experiment": ocp.JsonCheckpointHandler(),
      },
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *error: object) -> None:
    self._manager.close()

  def steps(self) -> list[int]:
    """The steps of all complete checkpoints."""
    return list(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest checkpoint's step."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the highest top-1; the newest where none was evaluated."""
    metrics = {step: self._manager.metrics(step) for step in self.steps()}
    evaluated = [(m["top1"], step) for step, m in metrics.items() if m]
    return max(evaluated)[1] if evaluated else self.latest_step()

  def save(
    self,
    state: TrainState,
    experiment: dict[str, Any],
    evaluation: Evaluation | None = None,
  ) -> None:
    """Starts to save; returns once the state may change again.

    Args:
      state: the state after some step.
      experiment: the config and what else a run may not change, as JSON.
      evaluation: of the state, by which the best is kept.
    """
    step = int(state.step)
    metrics = None
    if evaluation is not None:
      metrics = {"top1": evaluation.top1, "loss": evaluation.loss}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.StandardSave(state.ema),
        state=ocp.args.StandardSave(_without_ema(state)),
        experiment=ocp.args.JsonSave(experiment),
      ),
      metrics=metrics,
      force=True,
    )

  def wait(self) -> None:
    """Returns once every checkpoint is on disk."""
    self._manager.wait_until_finished()

  def experiment(self, step: int) -> dict[str, Any]:
    """What `save` was told of the experiment."""
    args = ocp.args.Composite(experiment=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)["experiment"]

  def restore_state(self, step: int, like: TrainState) -> TrainState:
    """The whole state, on the shardings of `like` (shapes are enough).

    Raises:
      TrainingError: the checkpoint is of another model.
    """
    self._check(step, like.ema)
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        ema=ocp.args.StandardRestore(like.ema),
        state=ocp.args.StandardRestore(_without_ema(like)),
      ),
    )
    return TrainState(ema=items["ema"], **items["state"])

  def restore_ema(self, step: int, like: Weights) -> Weights:
    """The moving average alone.

    Raises:
      TrainingError: the checkpoint is of another model.
    """
    self._check(step, like)
    args = ocp.args.Composite(ema=ocp.args.StandardRestore(like))
    return self._manager.restore(step, args=args)["ema"]

  def _check(self, step: int, like: Weights) -> None:
    metadata = self._manager.item_metadata(step)
    if metadata is None or metadata.get("ema") is None:
      raise TrainingError(
        f"{self._directory} step {step} is no checkpoint of this project"
      )
    saved = _shapes(metadata["ema"])
    wanted = _shapes(like)
    differing = [
      f"{name} is {saved.get(name, 'missing')} there and"
      f" {wanted.get(name, 'missing')} here"
      for name in sorted(saved.keys() | wanted.keys())
      if saved.get(name) != wanted.get(name)
    ]
    if differing:
      raise TrainingError(
        f"{self._directory} step {step} holds another model than"
        f" config.model asks for: {'; '.join(differing[:3])}"
      )


def load_ema(path: pathlib.Path, like: Weights) -> Weights:
  """The moving average in one checkpoint, or in the best of a directory.

  Args:
    path: a directory named by its step, or the one above.
    like: shapes and shardings.

  Raises:
    TrainingError: there is no checkpoint, or it is of another model.
  """
  with _open(path) as (checkpoints, step):
    return checkpoints.restore_ema(step, like)


def load_model(path: pathlib.Path) -> SpatialMamba:
  """The model that a checkpoint is of, with the moving average of its weights.

  Args:
    path: as for `load_ema`.

  Returns:
    The model on JAX's default device, in eval mode.

  Raises:
    TrainingError: there is no checkpoint, or it is of no such model.
  """
  with _open(path) as (checkpoints, step):
    model = PureModel(_model_section(checkpoints, step).build())
    device = SingleDeviceSharding(get_default_device())
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      model.shapes,
    )
    return model.bind(checkpoints.restore_ema(step, like))


def _model_section(checkpoints: Checkpoints, step: int) -> ModelSection:
  try:
    return ModelSection(**checkpoints.experiment(step)["model"])
  except (KeyError, TypeError) as error:
    raise TrainingError(
      f"step {step} does not say which model it is of: {error}"
    ) from error


@contextmanager
def _open(path: pathlib.Path) -> Iterator[tuple[Checkpoints, int]]:
  """The checkpoints that `path` is in, and the step that it means."""
  path = path.absolute()
  is_one = path.name.isdecimal()
  directory = path.parent if is_one else path
  if not directory.is_dir():
    raise TrainingError(f"{path} does not exist: train first, or mend the path")
  with Checkpoints(directory, create=False) as checkpoints:
    step = int(path.name) if is_one else checkpoints.best_step()
    if step is None or step not in checkpoints.steps():
      raise TrainingError(f"{path} holds no complete checkpoint")
    yield checkpoints, step


def _without_ema(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "weights": state.weights,
    "opt_state": state.opt_state,
    "window": state.window,
    "bad_step": state.bad_step,
  }


def _shapes(tree: Any) -> dict[str, list[int]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    str(getattr(path[-1], "key", path[-1])): list(leaf.shape)
    for path, leaf in leaves
  }
