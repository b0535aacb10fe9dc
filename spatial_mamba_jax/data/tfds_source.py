"""Reads data sets that TensorFlow Datasets prepared, without TensorFlow."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from spatial_mamba_jax.data import tfds_files, transforms
from spatial_mamba_jax.data.config import DataError
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.paths import local_path


def data_directory(data_dir: str) -> pathlib.Path:
  """The TFDS directory: the configured one, or TFDS's own default.

  Raises:
    DataError: if it is not on this machine, or there is no home directory.
  """
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return local_path(data_dir or default, "config.data.data_dir")


class TfdsSource:
  """One split of a prepared data set with image, label and file_name."""

  def __init__(
    self,
    directory: pathlib.Path,
    split: str,
    *,
    remedy: str,
    in_memory: bool = False,
  ):
    """Opens `DATA_DIR/NAME/VERSION`, whatever class had prepared it.

    Args:
      directory: the data set's version directory.
      split: which part of it.
      remedy: what to do where it is damaged.
      in_memory: read and decode everything now. Where images are tiny, this
        is most of the work.

    Raises:
      DataError: if the split is absent, is damaged or cannot be read in random
        order.
    """
    try:
      shards = tfds_files.read_shards(directory, split)
      contents = tfds_files.read_contents(directory)
    except tfds_files.DamageError as error:
      raise DataError(f"{error}: {remedy}") from error
    self.classes = contents.classes
    self.num_classes = len(self.classes)
    self._split = split
    self._examples = examples = _Examples(shards, contents)
    if in_memory:
      try:
        self._examples = [_decode(examples[i]) for i in range(len(examples))]
      except Exception as error:  # Whatever reading and decoding make of it.
        raise DataError(
          f"{directory} has a damaged record ({one_line(error)}): {remedy}"
        ) from error

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return self._examples[index]

  def name(self, index: int) -> str:
    """The file that image `index` was made from."""
    try:
      file_name = os.fsdecode(self._examples[index]["file_name"])
    except Exception:  # The record is damaged, so that only its place is known.
      return f"{self._split}[{index}]"
    return f"{self._split}/{file_name}"


class _Examples:
  """Records as dictionaries; the image stays a file in bytes."""

  def __init__(
    self, shards: list[tfds_files.Shard], contents: tfds_files.Contents
  ):
    # Any: a path is annotated as text, but may be bytes.
    paths: Any = shards
    self._records = array_record_data_source.ArrayRecordDataSource(paths)
    features: dict[str, tfds.features.FeatureConnector] = {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(num_classes=len(contents.classes)),
    }
    if contents.has_file_name:
      features["file_name"] = tfds.features.Text()
    self._features = tfds.features.FeaturesDict(features)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    # TFDS would decode the image with TensorFlow. Any: its annotations are
    # wider than what it does.
    example: Any = self._features.deserialize_example_np(
      self._records[index], decoders={"image": tfds.decode.SkipDecoding()}
    )
    return example


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
  except Exception as error:
    # A full disk is OSError, RuntimeError or ValueError, as TFDS, array_record
    # and protobuf have it.
    directory = pathlib.Path(builder.data_dir)
    if not (directory / "dataset_info.json").is_file():
      message = f"cannot prepare {directory}: {one_line(error)}"
      raise DataError(message) from error
