"""From a source of images to batches on the host, with grain."""

import dataclasses
import itertools
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

import grain
import numpy as np
from absl import flags

from spatial_mamba_jax.data import transforms
from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.data.sources import Source

Batch = dict[str, np.ndarray]

# With the default tolerance of one in a thousand, ten in a row do not happen.
_REPLACEMENTS = 10
_READABLE = -1


def train_batches(
  source: Source,
  config: DataConfig,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
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

  Returns:
    {"image": uint8 [B, image_size, image_size, 3], "label": int32 [B]} again
    and again.

  Raises:
    DataError: if a setting is wrong, or there are fewer images than processes.
  """
  config.validate()
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
    .random_map(_TrainingExample(source, config))
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
) -> "Batches":
  """Every image once, in the source's order, as many batches in each process.

  Args:
    source: the images.
    config: the data settings.
    batch_size: images in each batch of this process.
    process_index: which of the processes this one is.
    process_count: how many processes read different parts of the source.

  Returns:
    {"image": uint8 [B, image_size, image_size, 3], "label": int32 [B],
    "index": int32 [B], "mask": bool [B]}: the index is the image's place in the
    source, and beyond its end for the padding; the mask is False for unreadable
    images and for the padding, which are black and have label 0.

  Raises:
    DataError: if a setting is wrong.
  """
  config.validate()
  dataset = (
    # Padding without end: a worker that stops would keep shared memory.
    grain.MapDataset.range(sys.maxsize)
    .slice(slice(process_index, None, process_count))
    .map(_EvaluationExample(source, config))
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
    _ignore_pillow_warnings()
    batches = dataset.to_iter_dataset(
      grain.ReadOptions(
        num_threads=config.num_threads, prefetch_buffer_size=config.prefetch
      )
    )
    if config.num_workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags to start workers.
      batches = batches.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=config.num_workers,
          per_worker_buffer_size=config.prefetch,
        ),
        worker_init_fn=_start_worker,
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
      DataError: if more images are unreadable than the settings tolerate.
    """
    # Copies, because workers hand over shared memory that must be released.
    batch = {name: np.array(a) for name, a in next(self._batches).items()}
    for index in batch.pop("unreadable"):
      if index != _READABLE and index not in self._unreadable:
        self._report_unreadable(int(index))
    return batch

  @property
  def unreadable(self) -> tuple[str, ...]:
    """Names of the images that this process could not read so far."""
    return tuple(self._unreadable.values())

  def close(self) -> None:
    """Ends the threads and processes."""
    self._iterator.close()

  def _report_unreadable(self, index: int) -> None:
    name = self._source.name(index)
    self._unreadable[index] = name
    logging.warning("Unreadable image %s: %s", name, self._reason(index))
    count, total = len(self._unreadable), len(self._source)
    tolerated = self._config.max_unreadable_share
    if count > tolerated * total:
      named = ", ".join(list(self._unreadable.values())[:5])
      raise DataError(
        f"{count} of {total} images are unreadable, more than "
        f"data.max_unreadable_share={tolerated} allows: "
        f"{named}{', ...' if count > 5 else ''}"
      )

  def _reason(self, index: int) -> str:
    # Read again, because only numbers travel through the pipeline.
    try:
      encoded = self._source[index]["image"]
      transforms.decode_image(encoded, self._config.decoder)
    except Exception as error:
      return str(error) or type(error).__name__
    return "it was readable at the second attempt"


@dataclasses.dataclass(frozen=True)
class _TrainingExample:
  """Maps an image's place in the source to its part of a batch."""

  source: Source
  config: DataConfig

  def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    decoder = self.config.decoder
    example = _read(self.source, index, decoder)
    unreadable = index if example is None else _READABLE
    for _ in range(_REPLACEMENTS):
      if example is not None:
        break
      index = int(rng.integers(len(self.source)))
      example = _read(self.source, index, decoder)
    if example is None:
      raise DataError(
        f"{self.source.name(unreadable)} is unreadable, and so were "
        f"{_REPLACEMENTS} images drawn in its place"
      )
    image, label = example
    pixels = transforms.transform_for_training(image, self.config, rng)
    return {
      "image": pixels,
      "label": np.int32(label),
      "unreadable": np.int64(unreadable),
    }


@dataclasses.dataclass(frozen=True)
class _EvaluationExample:
  """Maps a place in the source, or beyond it, to its part of a batch."""

  source: Source
  config: DataConfig

  def __call__(self, index: int) -> dict[str, Any]:
    is_padding = index >= len(self.source)
    decoder = self.config.decoder
    example = None if is_padding else _read(self.source, index, decoder)
    if example is None:
      size = self.config.image_size
      pixels, label = np.zeros((size, size, 3), np.uint8), 0
    else:
      image, label = example
      pixels = transforms.transform_for_evaluation(image, self.config)
    is_unreadable = example is None and not is_padding
    return {
      "image": pixels,
      "label": np.int32(label),
      "index": np.int32(index),
      "mask": np.bool_(example is not None),
      "unreadable": np.int64(index if is_unreadable else _READABLE),
    }


def _read(source: Source, index: int, decoder: str) -> tuple[Any, int] | None:
  """The RGB image and its label, or None where they cannot be had."""
  try:
    example = source[index]
    image = transforms.decode_image(example["image"], decoder)
    return image, example["label"]
  except Exception:
    # Broken files make decoders raise nearly anything, among it OSError,
    # SyntaxError, struct.error and DecompressionBombError.
    return None


def _ignore_pillow_warnings() -> None:
  """Odd metadata and the like must not fail where warnings are errors."""
  warnings.filterwarnings("ignore", module=r"PIL\.")


def _start_worker(worker_index: int, worker_count: int) -> None:
  """Prepares a worker process; grain passes arguments it does not need."""
  del worker_index, worker_count
  _ignore_pillow_warnings()
  # The accelerator belongs to the main process. If jax was imported on the way
  # here, it has read its variable already, but started no backend.
  os.environ["CUDA_VISIBLE_DEVICES"] = ""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  jax.config.update("jax_platforms", "cpu")
  # Signals reach the whole process group; it is for the main process to decide
  # what they mean, perhaps to save first, and then to end its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Without this a worker would outlive a main process that was killed."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
