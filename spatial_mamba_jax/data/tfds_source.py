"""Reads data sets that TensorFlow Datasets prepared, without TensorFlow."""

import os
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from spatial_mamba_jax.data import transforms
from spatial_mamba_jax.data.config import DataError


def data_directory(data_dir: str) -> pathlib.Path:
  """The TFDS directory: the configured one, or TFDS's own default."""
  default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  return pathlib.Path(data_dir or default).expanduser()


def is_prepared(directory: pathlib.Path) -> bool:
  """Whether a data set's version directory is complete."""
  return (directory / "dataset_info.json").is_file()


class TfdsSource:
  """One split of a prepared data set with image, label and file_name."""

  def __init__(
    self, directory: pathlib.Path, split: str, *, in_memory: bool = False
  ):
    """Opens `DATA_DIR/NAME/VERSION`, whatever class had prepared it.

    Args:
      directory: the data set's version directory.
      split: which part of it.
      in_memory: read and decode everything now. Where images are tiny, this
        is most of the work.

    Raises:
      DataError: if the split is absent or cannot be read in random order.
    """
    # Any: the annotations of TFDS are narrower than what it does.
    builder: Any = tfds.builder_from_directory(directory)
    file_format = builder.info.file_format
    if file_format is None or file_format.value != "array_record":
      raise DataError(
        f"{directory} is stored as {file_format and file_format.value}, which "
        "cannot be read in random order: it needs file_format=array_record"
      )
    if split not in builder.info.splits:
      raise DataError(
        f"{directory} has no {split} split, "
        f"only {', '.join(builder.info.splits) or 'none'}"
      )
    self.classes: list[str] = builder.info.features["label"].names
    self.num_classes: int = builder.info.features["label"].num_classes
    self._split = split
    # The image stays encoded: TFDS would decode it with TensorFlow.
    examples = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    self._examples = [*map(_decode, examples)] if in_memory else examples

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[index]

  def name(self, index: int) -> str:
    """The file that image `index` was made from."""
    try:
      file_name = os.fsdecode(self._examples[index]["file_name"])
    except Exception:  # The record is damaged, so that only its place is known.
      return f"{self._split}[{index}]"
    return f"{self._split}/{file_name}"


def _decode(example: dict[str, Any]) -> dict[str, Any]:
  image = transforms.decode_image(example["image"])
  return {**example, "image": np.asarray(image)}


def prepare(builder: tfds.core.GeneratorBasedBuilder) -> None:
  """Writes the builder's data set as array_record, all or nothing.

  TFDS writes to a temporary directory and renames it, so that of several
  processes that prepare the same data set at once the first to finish wins.

  Raises:
    DataError: if a file cannot be read or written.
  """
  try:
    builder.download_and_prepare(file_format="array_record")
  except OSError as error:
    if not is_prepared(pathlib.Path(builder.data_dir)):
      raise DataError(f"cannot prepare {builder.data_dir}: {error}") from error
