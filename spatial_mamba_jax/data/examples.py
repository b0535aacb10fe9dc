"""From a record of a source to an example: what a task has to say about it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spatial_mamba_jax.data.config import DataError

# Arrays that the pipeline adds to a batch.
RESERVED = ("index", "mask", "wrong", "record", "reason")


class WrongRecordError(DataError):
  """A record that shows that the data set is wrong; it ends the run."""


@runtime_checkable
class Examples(Protocol):
  """Makes examples of a source's records, on the host.

  Worker processes receive a pickled copy.
  """

  def read(self, record: Mapping[str, Any]) -> Any:
    """Decodes a record.

    Raises:
      WrongRecordError: the data set is wrong.
      Exception: any other says that the record is unreadable.
    """
    ...

  def train(
    self, decoded: Any, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """A training example, augmented by draws of `rng`."""
    ...

  def evaluate(self, decoded: Any) -> dict[str, np.ndarray]:
    """An example to be evaluated."""
    ...

  def blank(self, *, train: bool) -> dict[str, np.ndarray]:
    """An example for padding, and in the place of unreadable records.

    Its names, shapes and types are those of `train`, or of `evaluate`. No name
    is one of `RESERVED`.
    """
    ...
