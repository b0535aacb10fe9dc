"""Reads a record into an example, with the status of the record."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_jax.data.examples import Examples, WrongRecordError
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


@dataclasses.dataclass(frozen=True)
class EvaluationReader:
  """Reads evaluation examples; beyond the source's end, returns padding."""

  source: Source
  examples: Examples

  def __call__(self, index: int) -> dict[str, Any]:
    """Returns an example with all arrays of `RESERVED`."""
    is_padding = index >= len(self.source)
    outcome = (
      _Outcome(self.examples.blank(train=False))
      if is_padding
      else _read(
        self.source,
        self.examples,
        index,
        self.examples.evaluate,
        train=False,
      )
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
