"""ImageNet-1k as TensorFlow Datasets lays it out, without TensorFlow."""

import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from spatial_mamba_jax.data import image_folder, tfds_source
from spatial_mamba_jax.data.config import DataConfig, DataError

NAME = "imagenet2012"
VERSION = "5.1.0"
EXTENSIONS = (".jpeg", ".jpg")

with registered.skip_registration():

  class Imagenet2012(tfds.core.GeneratorBasedBuilder):
    """TFDS's `imagenet2012`, written from a tree of JPEG files.

    TFDS orders examples by their keys, the file names; with the same keys this
    gives the same order. TFDS also re-encodes 22 CMYK files and one PNG as RGB
    JPEG; here every file keeps its bytes, and reading converts to RGB.
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
    ) -> Iterator[tuple[str, dict[str, Any]]]:
      for index in range(len(images)):
        file_name = images.path(index).name
        yield file_name, {**images[index], "file_name": file_name}


def open_split(config: DataConfig, split: str) -> tfds_source.TfdsSource:
  """Opens a prepared ImageNet.

  Raises:
    DataError: saying how to prepare it, if it is not there.
  """
  data_dir = tfds_source.data_directory(config.data_dir)
  directory = data_dir / NAME / VERSION
  if not tfds_source.is_prepared(directory):
    raise DataError(
      f"{NAME} {VERSION} is not prepared in {data_dir}: set data.data_dir, or "
      "run python -m spatial_mamba_jax.data.prepare_imagenet "
      f"--image_folder=DIR --data_dir={data_dir}"
    )
  return tfds_source.TfdsSource(directory, split)


def prepare(root: pathlib.Path, data_dir: str) -> pathlib.Path:
  """Writes the tree in `root` as TFDS's `imagenet2012`, all or nothing.

  Args:
    root: holds `train/<class>/*.JPEG` and `val/<class>/*.JPEG`.
    data_dir: the TFDS directory to write to; empty means the default.

  Returns:
    The directory written.

  Raises:
    DataError: if the tree is not so, or the data set is there already.
  """
  directory = tfds_source.data_directory(data_dir) / NAME / VERSION
  if directory.exists():
    raise DataError(f"{directory} exists: remove it to prepare it anew")
  splits = {
    split: image_folder.open_tree(root, split, EXTENSIONS)
    for split in ("train", "validation")
  }
  for images in splits.values():
    _check_names_differ(images)
  tfds_source.prepare(Imagenet2012(splits, data_dir=directory.parent.parent))
  return directory


def _check_names_differ(images: image_folder.ImageFolder) -> None:
  """TFDS would notice only after reading everything."""
  seen: set[str] = set()
  for index in range(len(images)):
    file_name = images.path(index).name
    if file_name in seen:
      raise DataError(
        f"two files in {images.root} are called {file_name}, but in ImageNet "
        "names are unique: read this tree with data.name=image_folder"
      )
    seen.add(file_name)
