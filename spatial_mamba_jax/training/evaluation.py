"""Evaluates weights, or a checkpoint, on every record of a split."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from spatial_mamba_jax.data import Source, evaluation_batches
from spatial_mamba_jax.errors import reason, say
from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.paths import local_path, make_directory
from spatial_mamba_jax.tasks.base import Evaluation, Meter
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.program import Evaluator, make_evaluator
from spatial_mamba_jax.training.sharding import (
  local_rows,
  make_mesh,
  shard_batch,
)
from spatial_mamba_jax.training.weights import load_weights


class Measured:
  """Predictions of one set of weights, and the evaluation of these.

  Attributes:
    meter: the task's meter, with the predictions for all readable records.
  """

  def __init__(self, meter: Meter):
    """Starts without predictions."""
    self.meter = meter
    self._unreadable = 0

  def add(self, columns: dict[str, np.ndarray], records: int) -> None:
    """Adds the predictions for a batch.

    Args:
      columns: the result of an evaluation step, in host memory.
      records: the number of records in the source.
    """
    index, mask = columns["index"], columns.pop("mask")
    # Padding has indices beyond the end of the source.
    self._unreadable += int((~mask & (index < records)).sum())
    self.meter.add({name: column[mask] for name, column in columns.items()})

  @property
  def evaluation(self) -> Evaluation:
    """The evaluation of all predictions so far."""
    return self.meter.result(self._unreadable)


def evaluate(
  evaluator: Evaluator, weights: Mapping[str, Weights], source: Source
) -> dict[str, Measured]:
  """Evaluates several sets of weights in one pass over a source.

  Args:
    evaluator: the evaluation step, the task and the mesh.
    weights: {name: weights}, on the devices of the mesh.
    source: the records, each of which is read once.

  Returns:
    {name: predictions and evaluation}, the same in every process.
  """
  config, task = evaluator.config, evaluator.task
  found = {name: Measured(task.meter(source)) for name in weights}
  with evaluation_batches(
    source,
    config.data,
    batch_size=config.evaluation_batch_size,
    rows=local_rows(config.evaluation_batch_size, evaluator.mesh),
    examples=task.examples(),
  ) as batches:
    # Results are fetched one step late, so that the device computes while the
    # next batch is read.
    steps = (
      {name: evaluator.eval_step(each, batch) for name, each in weights.items()}
      for batch in (shard_batch(batch, evaluator.mesh) for batch in batches)
    )
    for step, _ in itertools.pairwise(itertools.chain(steps, (None,))):
      for name, columns in jax.device_get(step).items():
        found[name].add(columns, len(source))
  return found


class Evaluated(NamedTuple):
  """The result of `evaluate_checkpoint`.

  Attributes:
    step: the step of the checkpoint; None for a file of weights.
    evaluations: the evaluations of the moving average, "ema", and of the
      weights, "raw". Some files have only one of the two. With `ema_decay=0`
      both are the same, and only the first is evaluated.
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
  if "ema" in weights and not config.ema_decay:
    weights = {"ema": weights["ema"]}  # The raw weights are the same.
  shapes = set()

  def eval_step(weights, batch):
    shapes.add(tuple(x.shape for x in batch.values()))
    return evaluator.eval_step(weights, batch)

  with jax.set_mesh(mesh):  # Kernels are sharded over it.
    counted = dataclasses.replace(evaluator, eval_step=eval_step)
    found = evaluate(counted, weights, source)
  if len(shapes) > 1 and not jax.process_index():
    say(
      f"{len(source):,} records of {len(shapes)} shapes: a program was compiled"
      " for each shape"
    )
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
