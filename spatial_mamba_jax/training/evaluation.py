"""Evaluates weights on every record of a split."""

import itertools
from collections.abc import Mapping

import jax
import numpy as np

from spatial_mamba_jax.data import Source, evaluation_batches
from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.tasks.base import Evaluation, Meter
from spatial_mamba_jax.training.program import Evaluator
from spatial_mamba_jax.training.sharding import local_rows, shard_batch


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
