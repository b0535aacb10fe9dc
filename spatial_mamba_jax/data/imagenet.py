"""ImageNet-1k in the layout of TensorFlow Datasets, without TensorFlow."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from spatial_mamba_jax.data import image_folder, tfds_source
from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.errors import one_line

NAME = "imagenet2012"
VERSION = "5.1.0"
EXTENSIONS = (".jpeg", ".jpg")

with registered.skip_registration():

  class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """TFDS's `imagenet2012`, written from a tree of JPEG files.

    TFDS orders examples by their keys, the file names. Here the keys are the
    same, and so is the order. TFDS also re-encodes 22 CMYK files and one PNG as
    RGB JPEG. Here every file keeps its bytes, and decoding converts to RGB.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(
      self, splits: dict[str, image_folder.ImageFolder], **kwargs: Any
    ):
      self._images = splits
      super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
      classes = self._images["train"].classes
      return self.dataset_info_from_configs(
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
      self, images: image_folder.ImageFolder
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
      for index in range(len(images)):
        # Bytes, because names may be in any encoding.
        file_name = os.fsencode(images.path(index).name)
        yield file_name, {**images[index], "file_name": file_name}


def open_split(config: DataConfig, split: str) -> tfds_source.TfdsSource:
  """Opens a prepared ImageNet.

  Raises:
    DataError: it is missing; the message says how to prepare it.
  """
  data_dir = tfds_source.data_directory(config.data_dir)
  directory = data_dir / NAME / VERSION
  command = (
    "python -m spatial_mamba_jax.data.prepare_imagenet --image_folder=DIR "
    f"--data_dir={data_dir}"
  )
  if not os.path.lexists(directory):
    raise DataError(
      f"{NAME} {VERSION} is not prepared in {data_dir}: set "
      f"config.data.data_dir, or run {command}"
    )
  return tfds_source.TfdsSource(
    directory, split, remedy=f"remove {directory} and run {command}"
  )


def prepare(root: pathlib.Path, data_dir: str) -> pathlib.Path:
  """Writes the tree in `root` as TFDS's `imagenet2012`, all or nothing.

  Args:
    root: a directory with `train/<class>/*.JPEG` and `val/<class>/*.JPEG`.
    data_dir: the TFDS directory to write to; empty for the default.

  Returns:
    The data set's directory.

  Raises:
    DataError: the tree has another layout, or the data set already exists.
  """
  directory = tfds_source.data_directory(data_dir) / NAME / VERSION
  if os.path.lexists(directory):
    raise DataError(f"{directory} exists: remove it to prepare it again")
  splits = {
    split: image_folder.open_tree(root, split, EXTENSIONS)
    for split in ("train", "validation")
  }
  for images in splits.values():
    _check_names_differ(images)
    _check_class_names(images)
  tfds_source.prepare(Imagenet2012(splits, data_dir=directory.parent.parent))
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
