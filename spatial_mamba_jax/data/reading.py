"""Reads a record into an example, with the status of the record."""

import bisect
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_jax.data.examples import Examples, Group, WrongRecordError
from spatial_mamba_jax.data.sources import Source
from spatial_mamba_jax.errors import one_line

# Most replacements drawn for an unreadable record. Even if half of the records
# are unreadable, a hundred in a row do not happen.
REPLACEMENTS = 100
# Statuses of a record. Batches carry the status as an integer and the reason as
# UTF-8, because an exception would end the worker process.
GOOD, UNREADABLE, IRREPLACEABLE, WRONG = range(4)
_REASON_BYTES = 240


class _Outcome(NamedTuple):
  """An example; a blank one if the record's status `wrong` is not `GOOD`."""

  example: dict[str, np.ndarray]
  wrong: int = GOOD
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class TrainingReader:
  """Reads training examples.

  If a record is unreadable, it reads random records until one is readable. The
  status is the first record's, unless another record is wrong.
  """

  source: Source
  examples: Examples

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns an example with the arrays "wrong", "record" and "reason"."""

    def read(index: int) -> _Outcome:
      return _read(
        self.source,
        self.examples,
        index,
        lambda decoded: self.examples.train(decoded, rng),
        train=True,
      )

    first = outcome = read(index)
    replacement = index
    for _ in range(REPLACEMENTS):
      if outcome.wrong != UNREADABLE:
        break
      replacement = int(rng.integers(len(self.source)))
      outcome = read(replacement)
    if outcome.wrong == UNREADABLE:
      first = first._replace(wrong=IRREPLACEABLE)
    elif outcome.wrong == WRONG:
      index, first = replacement, outcome
    return outcome.example | _status_arrays(index, first)


class Slot(NamedTuple):
  """A place in an evaluation batch.

  Attributes:
    group: the number of the batch's group.
    record: the index of a record; beyond the source's end for padding.
  """

  group: int
  record: int


class EvaluationSlots:
  """The slots of all batches, one after the other: a random-access source.

  The groups follow one another, each padded to whole batches. After the last
  one comes endless padding, because a worker that stops keeps its shared
  memory.
  """

  def __init__(
    self, groups: Sequence[Group], *, num_records: int, batch_size: int
  ):
    """Places all records of a source.

    Raises:
      ValueError: the groups do not have this number of records.
    """
    counts = [len(group.indices) for group in groups]
    if sum(counts) != num_records:
      raise ValueError(f"{sum(counts)} of {num_records} records have a group")
    self._indices = [group.indices for group in groups]
    self._batch_size = batch_size
    # Numbers of the batches and of the records up to each group's end.
    batches = (-(-count // batch_size) for count in counts)
    self._batches = list(itertools.accumulate(batches))
    self._records = list(itertools.accumulate(counts))

  @property
  def num_batches(self) -> int:
    """The number of batches with records."""
    return self._batches[-1]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, slot: int) -> Slot:
    batch = slot // self._batch_size
    last = len(self._batches) - 1
    group = min(bisect.bisect_right(self._batches, batch), last)
    first = self._batches[group - 1] * self._batch_size if group else 0
    indices = self._indices[group]
    if slot - first < len(indices):
      return Slot(group, int(indices[slot - first]))
    # Padding is counted from the source's end.
    return Slot(group, self._records[-1] + slot - self._records[group])


@dataclasses.dataclass(frozen=True)
class EvaluationReader:
  """Reads evaluation examples; beyond the source's end, returns padding.

  Attributes:
    source: the records.
    examples: what reads the records of each group.
  """

  source: Source
  examples: tuple[Examples, ...]

  def __call__(self, slot: Slot) -> dict[str, Any]:
    """Returns an example with all arrays of `RESERVED`."""
    index, examples = slot.record, self.examples[slot.group]
    is_padding = index >= len(self.source)
    outcome = (
      _Outcome(examples.blank(train=False))
      if is_padding
      else _read(self.source, examples, index, examples.evaluate, train=False)
    )
    return {
      **outcome.example,
      "index": np.int32(index),
      "mask": np.bool_(not is_padding and outcome.wrong == GOOD),
      **_status_arrays(index, outcome),
    }


def _read(
  source: Source,
  examples: Examples,
  index: int,
  transform: Callable[[Any], dict[str, np.ndarray]],
  *,
  train: bool,
) -> _Outcome:
  try:
    return _Outcome(transform(examples.read(source[index])))
  except WrongRecordError as error:
    return _Outcome(examples.blank(train=train), WRONG, one_line(error))
  except Exception as error:
    # Decoders raise nearly any exception for a broken file, among them OSError,
    # SyntaxError, struct.error, MemoryError and DecompressionBombError.
    reason = error.strerror if isinstance(error, OSError) else None
    blank = examples.blank(train=train)
    return _Outcome(blank, UNREADABLE, reason or one_line(error))


def _status_arrays(index: int, outcome: _Outcome) -> dict[str, Any]:
  reason = one_line(outcome.reason).encode()[:_REASON_BYTES]
  return {
    "wrong": np.int32(outcome.wrong),
    "record": np.int64(index),
    "reason": np.frombuffer(reason.ljust(_REASON_BYTES), np.uint8),
  }


def decode_reason(reason: np.ndarray) -> str:
  """Decodes an element of the array "reason"."""
  return reason.tobytes().decode(errors="ignore").rstrip()
