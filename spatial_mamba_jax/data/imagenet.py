"""ImageNet-1k in the layout of TensorFlow Datasets, without TensorFlow."""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from spatial_mamba_jax.data import image_folder, shrink, stores, tfds_source
from spatial_mamba_jax.data.config import SPLITS, DataConfig, DataError
from spatial_mamba_jax.data.sources import LabelledSource
from spatial_mamba_jax.errors import one_line

NAME = "imagenet2012"
VERSION = "5.1.0"
EXTENSIONS = (".jpeg", ".jpg")

# {split: images}, whose records have a "file_name".
Splits = Mapping[str, LabelledSource]

with registered.skip_registration():

  class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """TFDS's `imagenet2012`, written from files or from a prepared data set.

    TFDS orders examples by their keys, the file names. Here the keys are the
    same, and so is the order. TFDS also re-encodes 22 CMYK files and one PNG as
    RGB JPEG. Here every file keeps its bytes, and decoding converts to RGB;
    only with `max_side` are large images re-encoded.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(self, splits: Splits, max_side: int | None, **kwargs: Any):
      self._images = splits
      self._max_side = max_side
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      classes = self._images["train"].classes
      return self.dataset_info_from_configs(
        description=self._max_side and shrink.describe(self._max_side),
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=classes),
            "file_name": tfds.features.Text(),
          }
        ),
        supervised_keys=("image", "label"),
        homepage="https://image-net.org/",
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager  # The files are already there.
      return {
        split: self._generate_examples(images)
        for split, images in self._images.items()
      }

    def _generate_examples(
      self, images: LabelledSource
    ) -> Iterator[tuple[bytes, dict[str, Any]]]:
      def example(index: int) -> tuple[bytes, dict[str, Any]]:
        record = dict(images[index])
        if self._max_side:
          record["image"] = shrink.shrink(record["image"], self._max_side)
        return record["file_name"], record

      return shrink.map_in_order(example, len(images))


def open_split(config: DataConfig, split: str) -> tfds_source.TfdsSource:
  """Opens a prepared ImageNet.

  Raises:
    DataError: it is missing; the message says how to prepare it.
  """
  data_dir = tfds_source.readable_directory(config.data_dir)
  directory = data_dir / NAME / VERSION
  if stores.is_remote(directory):
    is_prepared = stores.exists(directory / "dataset_info.json")
    command = f"prepare it on a disk and copy its {NAME} to {data_dir}"
  else:
    is_prepared = stores.exists(directory)
    command = (
      "run python -m spatial_mamba_jax.data.prepare_imagenet "
      f"--image_folder=DIR --data_dir={data_dir}"
    )
  if not is_prepared:
    raise DataError(
      f"{NAME} {VERSION} is not prepared in {data_dir}: set "
      f"config.data.data_dir, or {command}"
    )
  return tfds_source.TfdsSource(
    directory, split, remedy=f"remove {directory} and {command}"
  )


def read_tree(root: pathlib.Path) -> Splits:
  """Opens a directory with `train/<class>/*.JPEG` and `val/<class>/*.JPEG`.

  Raises:
    DataError: it has another layout.
  """
  splits = {
    split: image_folder.open_tree(root, split, EXTENSIONS) for split in SPLITS
  }
  for images in splits.values():
    _check_names_differ(images)
    _check_class_names(images)
  return splits


def read_prepared(data_dir: pathlib.Path) -> Splits:
  """Opens a TFDS directory in which `imagenet2012` is prepared.

  Raises:
    DataError: it is missing or damaged.
  """
  config = DataConfig(name=NAME, data_dir=str(data_dir))
  return {split: open_split(config, split) for split in SPLITS}


def prepare(
  root: pathlib.Path,
  data_dir: str,
  *,
  read: Callable[[pathlib.Path], Splits] = read_tree,
  max_side: int | None = None,
) -> pathlib.Path:
  """Writes images as TFDS's `imagenet2012`, all or nothing.

  Args:
    root: the directory to read.
    data_dir: the TFDS directory to write to; empty for the default.
    read: opens `root`: `read_tree` or `read_prepared`.
    max_side: most pixels of an image's longer side; see `shrink.shrink`. None
      leaves every file unchanged.

  Returns:
    The data set's directory.

  Raises:
    DataError: the images have another layout, the data set already exists, or
      `max_side` is less than the recipe needs.
  """
  if max_side is not None:
    shrink.check_max_side(max_side)
  directory = tfds_source.data_directory(data_dir) / NAME / VERSION
  if os.path.lexists(directory):
    raise DataError(
      f"{directory} exists: remove it to prepare it again, or choose another"
      " --data_dir"
    )
  splits = read(root)
  tfds_source.prepare(
    Imagenet2012(splits, max_side, data_dir=directory.parent.parent)
  )
  return directory


def _check_names_differ(images: image_folder.ImageFolder) -> None:
  """Checks that file names are unique; TFDS does only after reading all."""
  seen: set[str] = set()
  for index in range(len(images)):
    file_name = images.path(index).name
    if file_name in seen:
      raise DataError(
        f"two files in {images.root} are called {file_name}, but in ImageNet "
        "names are unique: read this tree with config.data.name=image_folder"
      )
    seen.add(file_name)


def _check_class_names(images: image_folder.ImageFolder) -> None:
  """Checks that class names are lines of text, as TFDS stores them."""
  for name in images.classes:
    try:
      name.encode()
    except UnicodeEncodeError:
      is_line = False
    else:
      is_line = name.splitlines() == [name.strip()]
    if not is_line:
      raise DataError(
        f"the directory {one_line(images.root / name)} cannot be a class: its "
        "name is no line of UTF-8"
      )
