"""Reads a source's records into batches on the host, with grain."""

import itertools
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grain
import numpy as np
from absl import flags

from spatial_mamba_jax.data import workers
from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.data.examples import (
  RESERVED,
  Examples,
  Group,
  GroupedExamples,
)
from spatial_mamba_jax.data.labelled_images import LabelledImages
from spatial_mamba_jax.data.reading import (
  IRREPLACEABLE,
  REPLACEMENTS,
  WRONG,
  EvaluationReader,
  EvaluationSlots,
  TrainingReader,
  decode_reason,
)
from spatial_mamba_jax.data.sources import LabelledSource, Source
from spatial_mamba_jax.errors import one_line

Batch = dict[str, np.ndarray]


def train_batches(
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  rows: Sequence[int] | None = None,
  examples: Examples | None = None,
) -> "Batches":
  """Returns endless batches of shuffled and augmented examples.

  They depend only on the source, the transforms' config and these arguments,
  not on the number of workers or threads. Processes that read different rows
  read parts of the same batches. A random image replaces an unreadable one.

  Workers import the main script, so it needs its `if __name__ == "__main__"`.

  Args:
    source: the images.
    config: the config of the pipeline.
    batch_size: images in each batch, over all processes.
    seed: seed of order and transforms; the same in all processes.
    start_step: number of batches to skip, to resume.
    rows: the rows of each batch that this process reads; None for all.
    examples: turns records into examples; None for images with labels.

  Returns:
    Batches of `examples.train`; by default {"image": uint8 [B, image_size,
    image_size, 3], "label": int32 [B]}, where B is the number of rows.

  Raises:
    DataError: the config is wrong.
  """
  config.validate()
  examples = _checked(examples or _labelled_images(source, config))
  rows = range(batch_size) if rows is None else rows
  shuffled = (
    grain.MapDataset.range(len(source))
    .seed(seed)
    .shuffle()
    # This slice takes everything. Without it, grain would draw another seed for
    # the transforms, and a resumed run would see other images.
    .slice(slice(None))
    .repeat(None)
    .random_map(TrainingReader(source, examples))
  )
  dataset = (
    grain.MapDataset.source(_Rows(shuffled, batch_size, rows))
    .batch(len(rows), drop_remainder=True)
    .slice(slice(start_step, None))
  )
  return Batches(dataset, source, config)


def evaluation_batches(
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  rows: Sequence[int] | None = None,
  examples: Examples | None = None,
) -> "Batches":
  """Returns batches of each image once.

  Images are in the source's order; with `GroupedExamples`, in the order of the
  groups. A batch has images of one group, and the last batch of each group is
  padded. All processes have the same number of batches.

  Args:
    source: the images.
    config: the config of the pipeline.
    batch_size: images in each batch, over all processes.
    rows: the rows of each batch that this process reads; None for all.
    examples: turns records into examples; None for images with labels.

  Returns:
    Batches of `examples.evaluate`, with "index" int32 [B] and "mask" bool [B],
    where B is the number of rows. The index is the record's in the source;
    padding has indices beyond the source's end. The mask is False for padding
    and for unreadable records, whose examples are the group's `blank()`.

  Raises:
    DataError: the config is wrong.
  """
  config.validate()
  examples = _checked(examples or _labelled_images(source, config))
  rows = range(batch_size) if rows is None else rows
  workers.ignore_pillow_warnings()  # Groups may need the images' headers.
  groups = (
    examples.groups(source)
    if isinstance(examples, GroupedExamples)
    else (Group(examples, range(len(source))),)
  )
  slots = EvaluationSlots(
    groups, num_records=len(source), batch_size=batch_size
  )
  reader = EvaluationReader(source, tuple(group.examples for group in groups))
  dataset = (
    grain.MapDataset.source(_Rows(slots, batch_size, rows))
    .map(reader)
    .batch(len(rows), drop_remainder=True)
  )
  return Batches(dataset, source, config, slots.num_batches)


class _Rows:
  """The examples in some rows of each batch, one batch after the other.

  Rows are taken after the random transforms, so that an example is the same
  whichever process reads it.
  """

  def __init__(
    self,
    examples: grain.MapDataset | EvaluationSlots,
    batch_size: int,
    rows: Sequence[int],
  ):
    self._examples = examples
    self._batch_size = batch_size
    self._rows = tuple(rows)

  def __len__(self) -> int:
    return len(self._examples) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Any:
    batch, i = divmod(index, len(self._rows))
    return self._examples[batch * self._batch_size + self._rows[i]]


class Batches:
  """An iterator over batches, with the threads and processes that read them.

  Use it in a `with` statement, which ends them.
  """

  def __init__(
    self,
    dataset: grain.MapDataset,
    source: Source,
    config: DataConfig,
    num_batches: int | None = None,
  ):
    """Starts no reading yet; `num_batches` is None for endless batches."""
    self._source = source
    self._config = config
    self._unreadable: dict[int, str] = {}
    # Number of images of each class not found unreadable, if labels are known.
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
    # Fills the buffers while the caller compiles.
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
      DataError: more images are unreadable than the config tolerates, or the
        data set is wrong (`WrongRecordError`).
    """
    # Copies, because arrays from workers are shared memory, to be released.
    batch = {name: np.array(a) for name, a in self._next().items()}
    wrong, record, reason = (
      batch.pop(name) for name in ("wrong", "record", "reason")
    )
    for i in np.flatnonzero(wrong):
      self._report(int(wrong[i]), int(record[i]), decode_reason(reason[i]))
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
    """The names of the images that this process could not read so far."""
    return tuple(self._unreadable.values())

  def close(self) -> None:
    """Ends the threads and processes."""
    self._iterator.close()

  def _report(self, wrong: int, index: int, reason: str) -> None:
    name = one_line(self._source.name(index))
    if wrong == WRONG:
      raise DataError(f"{name}: {reason}")
    if index not in self._unreadable:
      self._report_unreadable(index, name, reason)
    if wrong == IRREPLACEABLE:
      raise DataError(
        f"{name} is unreadable, and so were {REPLACEMENTS} images drawn in "
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
        f"{named}{', ...' if count > 5 else ''}; repair or remove them, or "
        "raise it"
      )

  def _lost_class(self, index: int) -> str:
    """Returns a note if the image was the last readable one of its class."""
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
