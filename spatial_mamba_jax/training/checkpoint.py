"""Checkpoints: the newest few and the best, written while training goes on."""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from spatial_mamba_jax.convert import from_torch
from spatial_mamba_jax.convert.architecture import abstract_model
from spatial_mamba_jax.convert.files import SAFETENSORS, read_file
from spatial_mamba_jax.models import ModelConfig, SpatialMamba
from spatial_mamba_jax.training.config import TrainingError
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

  def save_weights(self, step: int, weights: Weights) -> None:
    """Saves weights alone, which can be evaluated, but not trained on."""
    args = ocp.args.Composite(ema=ocp.args.StandardSave(weights))
    self._manager.save(step, args=args, force=True)

  def wait(self) -> None:
    """Returns once every checkpoint is on disk."""
    self._manager.wait_until_finished()

  def experiment(self, step: int) -> dict[str, Any]:
    """What `save` was told of the experiment.

    Raises:
      TrainingError: the checkpoint is of weights alone.
    """
    if self._items(step).get("state") is None:
      raise TrainingError(
        f"{self._directory} step {step} holds weights alone, and no run to"
        " resume: choose another workdir"
      )
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

  def restore_weights(self, step: int, *, raw: bool) -> Weights:
    """The weights of whatever model, on one device.

    Args:
      step: of the checkpoint.
      raw: whether to read the trained weights, and not their moving average.

    Raises:
      TrainingError: the checkpoint has none.
    """
    item = "state" if raw else "ema"
    metadata = self._items(step).get(item)
    if metadata is None:
      raise TrainingError(
        f"{self._directory} step {step} holds one set of weights alone"
      )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      metadata.tree,
    )
    args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
    tree = self._manager.restore(step, args=args)[item]
    return Weights(**(tree["weights"] if raw else tree))

  def _items(self, step: int) -> Any:
    """The shapes of a checkpoint's items, {item: tree}."""
    metadata = self._manager.item_metadata(step)
    if metadata is None or metadata.get("ema") is None:
      raise TrainingError(
        f"{self._directory} step {step} is no checkpoint of this project"
      )
    return metadata

  def _check(self, step: int, like: Weights) -> None:
    saved = _shapes(self._items(step)["ema"])
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


def load_weights(
  path: pathlib.Path, config: ModelConfig, like: Weights
) -> Weights:
  """The weights in a file or directory of any kind.

  Args:
    path: a checkpoint as `open_checkpoint` takes it, or a file or directory as
      `convert.files.read_file` takes it. Of several weights, the moving
      average is taken.
    config: the architecture that they must fit.
    like: its shapes, on the shardings wanted.

  Raises:
    TrainingError: there are no weights, or they are of another model.
  """
  if path.is_dir() and not (path / SAFETENSORS).exists():
    with open_checkpoint(path) as (checkpoints, step):
      return checkpoints.restore_ema(step, like)
  try:
    state_dict = read_file(path).state_dict
  except FileNotFoundError as error:
    raise TrainingError(
      f"{path} does not exist: train first, or mend the path"
    ) from error
  except (ImportError, OSError, ValueError) as error:
    raise TrainingError(str(error)) from error
  model = abstract_model(config)
  try:
    from_torch(model, state_dict)
  except ValueError as error:
    raise TrainingError(
      f"{path} holds another model than config.model asks for: {error}"
    ) from error
  weights = PureModel.weights_of(cast(SpatialMamba, model))
  return jax.tree.map(_placed_like, weights, like)


def _placed_like(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  # `device_put` cannot reach other processes' devices.
  values = np.asarray(x)
  return jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: values[index]
  )


@contextmanager
def open_checkpoint(path: pathlib.Path) -> Iterator[tuple[Checkpoints, int]]:
  """Opens one checkpoint, or the best of a directory, with its step.

  Args:
    path: a working directory, its `checkpoints`, or one of these, a directory
      named by its step.

  Raises:
    TrainingError: there is no checkpoint.
  """
  if (path / "checkpoints").is_dir():
    path = path / "checkpoints"
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
