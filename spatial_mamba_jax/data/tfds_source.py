"""Reads data sets that TensorFlow Datasets prepared, without TensorFlow."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from spatial_mamba_jax.data import stores, tfds_files, transforms
from spatial_mamba_jax.data.config import DataError
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.paths import local_path

_FIELD = "config.data.data_dir"


def data_directory(data_dir: str) -> pathlib.Path:
  """Returns the TFDS directory to write to: the configured one, or the default.

  Raises:
    UserError: it is not on this machine, or there is no home directory.
  """
  return local_path(data_dir or _default(), _FIELD)


def readable_directory(data_dir: str) -> pathlib.PurePath:
  """Returns the TFDS directory to read, which may be a `gs://` path.

  Raises:
    UserError: it is another URL, or there is no home directory.
  """
  return stores.location(data_dir or _default(), _FIELD)


def _default() -> str:
  return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


class TfdsSource:
  """One split of a prepared data set with image, label and file_name."""

  def __init__(
    self,
    directory: pathlib.PurePath,
    split: str,
    *,
    remedy: str,
    in_memory: bool = False,
  ):
    """Opens `DATA_DIR/NAME/VERSION`, whichever class prepared it.

    Args:
      directory: the data set's version directory.
      split: name of the split.
      remedy: end of a message about damage: what to do.
      in_memory: whether to read and decode everything now. For tiny images,
        reading is most of the pipeline's work.

    Raises:
      DataError: the split is missing, is damaged, or cannot be read in random
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
    self._records = records = _Records(shards, contents)
    if in_memory:
      try:
        self._records = [_decode(records[i]) for i in range(len(records))]
      except Exception as error:  # Readers and decoders raise any type.
        raise DataError(
          f"{directory} has a damaged record ({one_line(error)}): {remedy}"
        ) from error

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return self._records[index]

  def name(self, index: int) -> str:
    """Returns the name of the file that image `index` came from."""
    try:
      file_name = os.fsdecode(self._records[index]["file_name"])
    except Exception:  # A damaged record is known by its index alone.
      return f"{self._split}[{index}]"
    return f"{self._split}/{file_name}"


class _Records:
  """Records as dictionaries; the image stays an encoded file."""

  def __init__(
    self, shards: list[tfds_files.Shard], contents: tfds_files.Contents
  ):
    # Any: a path is annotated as text, but may be bytes.
    paths: Any = shards
    self._serialized = array_record_data_source.ArrayRecordDataSource(paths)
    features: dict[str, tfds.features.FeatureConnector] = {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(num_classes=len(contents.classes)),
    }
    if contents.has_file_name:
      features["file_name"] = tfds.features.Text()
    self._features = tfds.features.FeaturesDict(features)

  def __len__(self) -> int:
    return len(self._serialized)

  def __getitem__(self, index: int) -> dict[str, Any]:
    # TFDS would decode the image with TensorFlow. Any: TFDS annotates more
    # types than it returns.
    record: Any = self._features.deserialize_example_np(
      self._serialized[index], decoders={"image": tfds.decode.SkipDecoding()}
    )
    return record


def _decode(record: dict[str, Any]) -> dict[str, Any]:
  image = transforms.decode_image(record["image"])
  return {**record, "image": np.asarray(image)}


def prepare(builder: tfds.core.GeneratorBasedBuilder) -> None:
  """Writes the builder's data set as array_record, all or nothing.

  TFDS writes to a temporary directory and renames it. If several processes
  prepare the same data set at once, the first to finish wins.

  Raises:
    DataError: a file cannot be read or written.
  """
  try:
    builder.download_and_prepare(file_format="array_record")
  except Exception as error:
    # A full disk raises OSError in TFDS, RuntimeError in array_record, and
    # ValueError in protobuf.
    directory = pathlib.Path(builder.data_dir)
    if not (directory / "dataset_info.json").is_file():
      message = f"cannot prepare {directory}: {one_line(error)}"
      raise DataError(message) from error
