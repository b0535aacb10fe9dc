"""Reads and checks the files of a data set that TensorFlow Datasets prepared.

TFDS itself imports any module that `features.json` names, which may be a file
that came with the data. Here nothing that a file names is imported.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from spatial_mamba_jax.data import stores
from spatial_mamba_jax.data.config import DataError
from spatial_mamba_jax.errors import one_line

# Most classes of a data set; their names are held in memory.
MAX_CLASSES = 10**6
# Most bytes of a JSON file or a list of names; ImageNet's have under 100 kB.
_MAX_BYTES = 2**26
# TFDS's default template of a shard's file name, the only one that is read.
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# Keys under which TFDS looks for the name of a class.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
# Threads that check shards.
_READERS = 16


class DamageError(Exception):
  """A file is missing or is not as TFDS writes it; the message says why."""

  def __init__(self, path: pathlib.PurePath, why: object):
    if isinstance(why, OSError):
      why = why.strerror or why  # Without the path.
    super().__init__(f"{path} is damaged ({one_line(why)})")


class Shard(NamedTuple):
  """A file of records, as array_record's data source takes it.

  Attributes:
    filename: path of the file.
    skip: number of records to skip at the beginning.
    take: number of records to read after these.
    examples_in_shard: number of records in the file.
  """

  filename: bytes
  skip: int
  take: int
  examples_in_shard: int


class Contents(NamedTuple):
  """The features of a data set.

  Attributes:
    classes: class names by label; without names, the labels as text.
    has_file_name: whether records have a `file_name`.
  """

  classes: list[str]
  has_file_name: bool


def read_shards(directory: pathlib.PurePath, split: str) -> list[Shard]:
  """Returns the shards of a split, after checking their number of records.

  Args:
    directory: `DATA_DIR/NAME/VERSION`.
    split: name of the split.

  Raises:
    DataError: there is no such split, or no random access to it.
    DamageError: `dataset_info.json` or a shard is damaged.
  """
  path = directory / "dataset_info.json"
  info = _read_json(path)
  file_format = info.get("fileFormat")
  if not isinstance(file_format, str):
    raise DamageError(path, "it has no fileFormat")
  if file_format != "array_record":
    raise DataError(
      f"{directory} is stored as {one_line(file_format)}, which cannot be read "
      "in random order: it needs file_format=array_record"
    )
  name, splits = info.get("name"), info.get("splits", [])
  if not _is_name(name):
    raise DamageError(path, "it has no name")
  if not isinstance(splits, list) or not all(
    isinstance(part, dict) and _is_name(part.get("name")) for part in splits
  ):
    raise DamageError(path, "its splits have no names")
  by_name = {part["name"]: part for part in splits}
  if len(by_name) < len(splits):
    raise DamageError(path, "two splits have the same name")
  if split not in by_name:
    raise DataError(
      f"{directory} has no {split} split, only {', '.join(by_name) or 'none'}"
    )
  lengths = _read_lengths(path, by_name[split])
  prefix = f"{name}-{split}.array_record"
  paths = [
    directory / f"{prefix}-{i:05d}-of-{len(lengths):05d}"
    for i in range(len(lengths))
  ]
  with futures.ThreadPoolExecutor(_READERS) as executor:
    # Results come in order, so that the first damaged shard is reported.
    for _ in executor.map(_check_shard, paths, lengths):
      pass
  return [
    Shard(os.fsencode(path), 0, length, length)
    for path, length in zip(paths, lengths, strict=True)
  ]


def _read_lengths(path: pathlib.PurePath, split: dict[str, Any]) -> list[int]:
  name = split["name"]
  if split.get("filepathTemplate") not in (None, "", _TEMPLATE):
    raise DamageError(path, f"filepathTemplate of {name} is not {_TEMPLATE}")
  if _count(split.get("numBytes", 0)) is None:
    raise DamageError(path, f"numBytes of {name} is no count")
  lengths = split.get("shardLengths")
  if not isinstance(lengths, list) or not lengths:
    raise DamageError(path, f"{name} has no shardLengths")
  counts = [_count(length) for length in lengths]
  if None in counts or not any(counts):
    raise DamageError(path, f"shardLengths of {name} are no counts")
  return [count for count in counts if count is not None]


def _check_shard(path: pathlib.PurePath, length: int) -> None:
  try:
    # array_record opens even a directory, and explains little of other damage.
    if not stores.is_remote(path):
      stores.read(path, 0)
    reader = array_record_data_source.array_record_module.ArrayRecordReader(
      os.fsencode(path),
      options="readahead_buffer_size:0",
      file_reader_buffer_size=2**15,
    )
    count = reader.num_records()
    reader.close()
  except Exception as error:  # array_record's are RuntimeErrors, some empty.
    raise DamageError(path, error if str(error) else "it is cut") from error
  if count != length:
    raise DamageError(
      path, f"it has {count} records, {length} by dataset_info.json"
    )


def read_contents(directory: pathlib.PurePath) -> Contents:
  """Reads the features of an image classification data set.

  Args:
    directory: `DATA_DIR/NAME/VERSION`.

  Raises:
    DamageError: `features.json` or the file of the classes' names is damaged,
      or `features.json` names a Python class other than TFDS's own features.
  """
  path = directory / "features.json"
  features = _read_json(path)
  try:
    for class_name in _class_names(features):
      if class_name not in _feature_classes():
        raise DamageError(
          path,
          f"it names the class {class_name}, which is not one of TensorFlow "
          "Datasets' features, and code that comes with data is not run",
        )
  except RecursionError as error:
    raise DamageError(path, error) from error
  parts = _of_class(features, tfds.features.FeaturesDict, "featuresDict")
  by_name = None if parts is None else parts.get("features")
  if not isinstance(by_name, dict):
    raise DamageError(path, "it is no FeaturesDict")
  if _of_class(by_name.get("image"), tfds.features.Image, "image") is None:
    raise DamageError(path, "it has no feature image of the class Image")
  label = _of_class(
    by_name.get("label"), tfds.features.ClassLabel, "classLabel"
  )
  if label is None:
    raise DamageError(path, "it has no feature label of the class ClassLabel")
  num_classes = _count(label.get("numClasses"))
  if not num_classes or num_classes > MAX_CLASSES:
    raise DamageError(path, f"numClasses is not from 1 to {MAX_CLASSES}")
  file_name = _of_class(by_name.get("file_name"), tfds.features.Text, "text")
  return Contents(
    _read_class_names(directory / "label.labels.txt", num_classes),
    file_name is not None,
  )


def _read_class_names(path: pathlib.PurePath, num_classes: int) -> list[str]:
  if not stores.exists(path):
    return [str(label) for label in range(num_classes)]
  lines = (line.strip() for line in _read_text(path).split("\n"))
  names = [line for line in lines if line]
  if len(names) != num_classes or len(set(names)) != num_classes:
    raise DamageError(
      path,
      f"{len(set(names))} names in {len(names)} lines, but {num_classes} "
      "classes in features.json",
    )
  return names


def _of_class(feature: Any, of: type, key: str) -> dict[str, Any] | None:
  """Returns the description of a feature if it has this class, else None."""
  if not isinstance(feature, dict):
    return None
  class_name, content = feature.get("pythonClassName"), feature.get(key)
  if not isinstance(class_name, str) or not isinstance(content, dict):
    return None
  return content if _feature_classes().get(class_name) is of else None


@functools.cache
def _feature_classes() -> dict[str, type]:
  """Returns {name: class} of TFDS's own features, with all their aliases."""
  return {
    name: feature
    for feature in vars(tfds.features).values()
    if isinstance(feature, type)
    and issubclass(feature, tfds.features.FeatureConnector)
    for name in (
      f"{feature.__module__}.{feature.__name__}",
      *vars(feature).get("ALIASES", ()),
    )
  }


def _class_names(value: Any) -> Iterator[str]:
  """Yields all names of Python classes, also those in JSON within strings."""
  if isinstance(value, dict):
    for key, item in value.items():
      if key in _CLASS_KEYS and isinstance(item, str):
        yield item
      else:
        yield from _class_names(item)
  elif isinstance(value, list):
    for item in value:
      yield from _class_names(item)
  elif isinstance(value, str) and value.lstrip().startswith(("{", "[")):
    try:
      inner = json.loads(value)
    except ValueError:
      return
    yield from _class_names(inner)


def _read_json(path: pathlib.PurePath) -> dict[str, Any]:
  try:
    value = json.loads(_read_text(path))
  except (ValueError, RecursionError) as error:
    raise DamageError(path, error) from error
  if not isinstance(value, dict):
    raise DamageError(path, "it is no JSON object")
  return value


def _read_text(path: pathlib.PurePath) -> str:
  try:
    content = stores.read(path, _MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
      raise DamageError(path, f"it has more than {_MAX_BYTES:,} bytes")
    return content.decode()
  except (OSError, UnicodeDecodeError) as error:
    raise DamageError(path, error) from error


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and re.fullmatch(r"[\w.\-]+", value) is not None


def _count(value: Any) -> int | None:
  """Parses a count of protobuf's JSON, mostly a string of digits, else None."""
  if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
    return int(value)
  if not isinstance(value, int) or isinstance(value, bool):
    return None
  return value if 0 <= value < 2**63 else None
