"""What weights make of every record of a split."""

import itertools
from collections.abc import Mapping

import jax
import numpy as np

from spatial_mamba_jax.data import Source, evaluation_batches
from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.tasks.base import Evaluation, Meter
from spatial_mamba_jax.training.program import Evaluator
from spatial_mamba_jax.training.sharding import shard_batch


class Measured:
  """What an evaluation has found of one set of weights.

  Attributes:
    meter: the task's, with the predictions of all readable records.
    evaluation: its result.
  """

  def __init__(self, meter: Meter):
    """Nothing is found yet."""
    self.meter = meter
    self._unreadable = 0

  def add(self, columns: dict[str, np.ndarray], records: int) -> None:
    """Takes in a batch of an evaluation step, of a source of some records."""
    index, mask = columns["index"], columns.pop("mask")
    # Padding has the indices beyond the source's end.
    self._unreadable += int((~mask & (index < records)).sum())
    self.meter.add({name: column[mask] for name, column in columns.items()})

  @property
  def evaluation(self) -> Evaluation:
    """Of all records so far."""
    return self.meter.result(self._unreadable)


def evaluate(
  program: Evaluator, weights: Mapping[str, Weights], source: Source
) -> dict[str, Measured]:
  """Shows every record of a source to each of several sets of weights.

  Args:
    program: whose evaluation step it is.
    weights: {name: weights}, on the devices of the program's mesh.
    source: the records, each of which is read once.

  Returns:
    {name: what was found}, the same in every process.
  """
  config, task = program.config, program.task
  found = {name: Measured(task.meter(source)) for name in weights}
  with evaluation_batches(
    source,
    config.data,
    batch_size=config.evaluation_batch_size // jax.process_count(),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    examples=task.examples(),
  ) as batches:
    # One step behind, so that the device works while the next batch is read.
    steps = (
      {name: program.eval_step(each, batch) for name, each in weights.items()}
      for batch in (shard_batch(batch, program.mesh) for batch in batches)
    )
    for step, _ in itertools.pairwise(itertools.chain(steps, (None,))):
      for name, columns in jax.device_get(step).items():
        found[name].add(columns, len(source))
  return found
