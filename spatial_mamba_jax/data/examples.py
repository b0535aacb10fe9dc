"""The interface that turns a source's records into a task's examples."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from spatial_mamba_jax.data.config import DataError
from spatial_mamba_jax.data.sources import Source

# Names of the arrays that the pipeline adds to a batch.
RESERVED = ("index", "mask", "wrong", "record", "reason")


class WrongRecordError(DataError):
  """A record shows that the data set is wrong, which ends the run."""


@runtime_checkable
class Examples(Protocol):
  """Turns a source's records into examples, on the host.

  Worker processes receive a pickled copy.
  """

  def read(self, record: Mapping[str, Any]) -> Any:
    """Decodes a record.

    Raises:
      WrongRecordError: the data set is wrong.
      Exception: the record is unreadable.
    """
    ...

  def train(
    self, decoded: Any, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Returns a training example, augmented at random by `rng`."""
    ...

  def evaluate(self, decoded: Any) -> dict[str, np.ndarray]:
    """Returns an example for evaluation."""
    ...

  def blank(self, *, train: bool) -> dict[str, np.ndarray]:
    """Returns an example that stands for padding or an unreadable record.

    It has the names, shapes and dtypes of `train`'s examples, or of
    `evaluate`'s. No name is in `RESERVED`.
    """
    ...


class Group(NamedTuple):
  """Records whose examples for evaluation have equal shapes.

  Attributes:
    examples: what reads them. `evaluate` and `blank(train=False)` return
      examples of the group's shapes.
    indices: the indices of the records in the source.
  """

  examples: Examples
  indices: Sequence[int] | np.ndarray


@runtime_checkable
class GroupedExamples(Examples, Protocol):
  """Examples whose shapes in evaluation differ from record to record.

  Evaluation makes batches within a group. Examples for training have one shape.
  """

  def groups(self, source: Source) -> Sequence[Group]:
    """Sorts all records of a source into groups, each record into one."""
    ...
