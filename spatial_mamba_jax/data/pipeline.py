"""From a source of images to batches on the host, with grain."""

import dataclasses
import itertools
import logging
import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from spatial_mamba_jax.data import workers
from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.data.examples import (
  RESERVED,
  Examples,
  WrongRecordError,
)
from spatial_mamba_jax.data.labelled_images import LabelledImages
from spatial_mamba_jax.data.sources import LabelledSource, Source
from spatial_mamba_jax.errors import one_line

Batch = dict[str, np.ndarray]

# Where half of the images are unreadable, a hundred in a row do not happen.
_REPLACEMENTS = 100
# What can be wrong with a record. It travels through the pipeline as numbers,
# the reason as UTF-8: an exception would end its worker.
_GOOD, _UNREADABLE, _IRREPLACEABLE, _WRONG = range(4)
_REASON_BYTES = 240


def train_batches(
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  examples: Examples | None = None,
) -> "Batches":
  """Endless shuffled, randomly cropped and mirrored batches.

  They depend on nothing but the source, the transforms' settings and the
  arguments here: not on the number of workers or threads. In each epoch the
  processes see disjoint images; the few that do not divide among the processes
  are left out, others in each epoch. An unreadable image is replaced by
  another one, drawn at random.

  Workers import the main script, so it needs its `if __name__ == "__main__"`.

  Args:
    source: the images.
    config: the data settings.
    batch_size: images in each batch of this process.
    seed: of the order and of the transforms; the same in all processes.
    start_step: batches to pass over, as if they had been taken already.
    process_index: which of the processes this one is.
    process_count: how many processes read different parts of the source.
    examples: makes examples of records; None for images with labels.

  Returns:
    Again and again what `examples` makes; by default {"image": uint8 [B,
    image_size, image_size, 3], "label": int32 [B]}.

  Raises:
    DataError: if a setting is wrong, or there are fewer images than processes.
  """
  config.validate()
  examples = _checked(examples or _labelled_images(source, config))
  share = len(source) // process_count
  if not share:
    raise DataError(
      f"{len(source)} training images are too few for {process_count} processes"
    )
  dataset = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    # Also for one process: without this step the random stream would change.
    .slice(slice(process_index, share * process_count, process_count))
    .repeat(None)
    .random_map(_TrainingExample(source, examples))
    .batch(batch_size, drop_remainder=True)
    .slice(slice(start_step, None))
  )
  return Batches(dataset, source, config)


def evaluation_batches(
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  examples: Examples | None = None,
) -> "Batches":
  """Every image once, in the source's order, as many batches in each process.

  Args:
    source: the images.
    config: the data settings.
    batch_size: images in each batch of this process.
    process_index: which of the processes this one is.
    process_count: how many processes read different parts of the source.
    examples: makes examples of records; None for images with labels.

  Returns:
    What `examples` makes, with "index" int32 [B] and "mask" bool [B]. The
    index is the record's in the source; padding has indices beyond the
    source's end. The mask is False for padding and for unreadable records,
    which are `examples.blank()`.

  Raises:
    DataError: if a setting is wrong.
  """
  config.validate()
  examples = _checked(examples or _labelled_images(source, config))
  dataset = (
    # Padding without end: a worker that stops would keep shared memory.
    grain.MapDataset.range(sys.maxsize)
    .slice(slice(process_index, None, process_count))
    .map(_EvaluationExample(source, examples))
    .batch(batch_size, drop_remainder=True)
  )
  num_batches = math.ceil(len(source) / (batch_size * process_count))
  return Batches(dataset, source, config, num_batches)


class Batches:
  """An iterator over batches that owns the threads and processes behind it.

  Use it in a `with` statement: leaving that ends them.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    source: Source,
    config: DataConfig,
    num_batches: int | None = None,
  ):
    """Starts nothing yet; `num_batches` is None for endless batches."""
    self._source = source
    self._config = config
    self._unreadable: dict[int, str] = {}
    # Images of each class that may be readable, where labels are known.
    self._labels = getattr(source, "labels", None)
    if self._labels is not None:
      self._readable = np.bincount(self._labels)
    workers.ignore_pillow_warnings()
    batches = dataset.to_iter_dataset(
      grain.ReadOptions(
        num_threads=config.num_threads, prefetch_buffer_size=config.prefetch
      )
    )
    if config.num_workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags to start workers.
      workers.start_tracker()
      batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=config.num_workers,
          per_worker_buffer_size=config.prefetch,
        ),
        worker_init_fn=workers.start,
      )
    self._iterator = iter(batches)
    self._batches = itertools.islice(self._iterator, num_batches)

  def __enter__(self) -> "Batches":
    # Fills the buffers while the caller still compiles.
    self._iterator.start_prefetch()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Batch:
    """Returns the next batch.

    Raises:
      DataError: if more images are unreadable than the settings tolerate, or
        a label is not one of the source's classes.
    """
    # Copies, because workers hand over shared memory that must be released.
    batch = {name: np.array(a) for name, a in self._next().items()}
    wrong, record, reason = (
      batch.pop(name) for name in ("wrong", "record", "reason")
    )
    for i in np.flatnonzero(wrong):
      self._report(int(wrong[i]), int(record[i]), _decode_reason(reason[i]))
    return batch

  def _next(self) -> Batch:
    try:
      return next(self._batches)
    except RuntimeError as error:
      if "Worker process was terminated" not in str(error):
        raise
      raise DataError(
        f"{one_line(error)} If memory ran out: fewer config.data.num_workers,"
        " or a smaller config.data.prefetch"
      ) from error

  @property
  def unreadable(self) -> tuple[str, ...]:
    """Names of the images that this process could not read so far."""
    return tuple(self._unreadable.values())

  def close(self) -> None:
    """Ends the threads and processes."""
    self._iterator.close()

  def _report(self, wrong: int, index: int, reason: str) -> None:
    name = one_line(self._source.name(index))
    if wrong == _WRONG:
      raise DataError(f"{name}: {reason}")
    if index not in self._unreadable:
      self._report_unreadable(index, name, reason)
    if wrong == _IRREPLACEABLE:
      raise DataError(
        f"{name} is unreadable, and so were {_REPLACEMENTS} images drawn in "
        f"its place: {reason}"
      )

  def _report_unreadable(self, index: int, name: str, reason: str) -> None:
    self._unreadable[index] = self._source.name(index)
    lost = self._lost_class(index)
    logging.warning("Unreadable image %s: %s%s", name, reason, lost)
    count, total = len(self._unreadable), len(self._source)
    tolerated = self._config.max_unreadable_share
    if count > tolerated * total:
      named = ", ".join(map(one_line, [*self._unreadable.values()][:5]))
      raise DataError(
        f"{count} of {total} images are unreadable, more than "
        f"config.data.max_unreadable_share={tolerated} allows: "
        f"{named}{', ...' if count > 5 else ''}; mend or remove them, or "
        "raise it"
      )

  def _lost_class(self, index: int) -> str:
    """Says so where the image was the last of its class."""
    if self._labels is None:
      return ""
    label = self._labels[index]
    self._readable[label] -= 1
    if self._readable[label]:
      return ""
    assert isinstance(self._source, LabelledSource)
    name = one_line(self._source.classes[label])
    return f"; class {name} has no readable image"


def _checked(examples: Examples) -> Examples:
  for train in (True, False):
    if taken := examples.blank(train=train).keys() & set(RESERVED):
      raise ValueError(
        f"examples must not have arrays called {', '.join(sorted(taken))}: the"
        " pipeline adds some of these names to each batch"
      )
  return examples


def _labelled_images(source: Source, config: DataConfig) -> LabelledImages:
  assert isinstance(source, LabelledSource)
  return LabelledImages(source.num_classes, config)


class _Made(NamedTuple):
  """An example, or a blank one and what is wrong with its record."""

  example: dict[str, np.ndarray]
  wrong: int = _GOOD
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class _TrainingExample:
  """Maps the index of a record to its part of a batch."""

  source: Source
  examples: Examples

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    def make(index: int) -> _Made:
      return _make(
        self.source,
        self.examples,
        index,
        lambda decoded: self.examples.train(decoded, rng),
        train=True,
      )

    first = made = make(index)
    replacement = index
    for _ in range(_REPLACEMENTS):
      if made.wrong != _UNREADABLE:
        break
      replacement = int(rng.integers(len(self.source)))
      made = make(replacement)
    if made.wrong == _UNREADABLE:
      first = first._replace(wrong=_IRREPLACEABLE)
    elif made.wrong == _WRONG:
      index, first = replacement, made
    return made.example | _as_numbers(index, first)


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
  """Maps an index, maybe beyond the source's end, to its part of a batch."""

  source: Source
  examples: Examples

  def __call__(self, index: int) -> dict[str, Any]:
    is_padding = index >= len(self.source)
    made = (
      _Made(self.examples.blank(train=False))
      if is_padding
      else _make(
        self.source,
        self.examples,
        index,
        self.examples.evaluate,
        train=False,
      )
    )
    return {
      **made.example,
      "index": np.int32(index),
      "mask": np.bool_(not is_padding and made.wrong == _GOOD),
      **_as_numbers(index, made),
    }


def _make(
  source: Source,
  examples: Examples,
  index: int,
  transform: Callable[[Any], dict[str, np.ndarray]],
  *,
  train: bool,
) -> _Made:
  try:
    return _Made(transform(examples.read(source[index])))
  except WrongRecordError as error:
    return _Made(examples.blank(train=train), _WRONG, one_line(error))
  except Exception as error:
    # Broken files make decoders raise nearly anything, among it OSError,
    # SyntaxError, struct.error, MemoryError and DecompressionBombError.
    what = error.strerror if isinstance(error, OSError) else None
    blank = examples.blank(train=train)
    return _Made(blank, _UNREADABLE, what or one_line(error))


def _as_numbers(index: int, made: _Made) -> dict[str, Any]:
  reason = one_line(made.reason).encode()[:_REASON_BYTES]
  return {
    "wrong": np.int32(made.wrong),
    "record": np.int64(index),
    "reason": np.frombuffer(reason.ljust(_REASON_BYTES), np.uint8),
  }


def _decode_reason(reason: np.ndarray) -> str:
  return reason.tobytes().decode(errors="ignore").rstrip()
