"""Directories of images, and of their label maps by the same names."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spatial_mamba_jax.data import decoding
from spatial_mamba_jax.data.config import DataError
from spatial_mamba_jax.data.image_folder import EXTENSIONS, list_images
from spatial_mamba_jax.data.label_maps import make_palette, of_label_map
from spatial_mamba_jax.errors import one_line

# Suffix of label maps, in lower case.
_LABEL_SUFFIX = ".png"


class ImagePairs:
  """Images anywhere in a directory, sorted by path, and their label maps.

  The label map of `IMAGES/a/b.jpg` is `LABELS/a/b.png`. It implements
  `SegmentedSource`.

  Attributes:
    classes: the class names, by label.
    palette: a colour for each class, uint8 [K, 3].
  """

  def __init__(
    self,
    images: pathlib.Path,
    label_maps: pathlib.Path,
    classes: Sequence[str],
    *,
    offset: int,
    ignored: int,
    extensions: tuple[str, ...] = EXTENSIONS,
  ):
    """Lists and pairs the files.

    Args:
      images: the directory of images.
      label_maps: the directory of label maps.
      classes: the class names, by label.
      offset: what is subtracted from stored values.
      ignored: the stored value of pixels without a class.
      extensions: the suffixes of images, in lower case.

    Raises:
      DataError: there are no images, or an image or a label map is alone.
      OSError: a directory cannot be read.
    """
    self.classes = tuple(classes)
    self.palette = make_palette(len(classes))
    self._images, self._label_maps = images, label_maps
    self._offset, self._ignored = offset, ignored
    image_suffix = extensions[0] if len(extensions) == 1 else ".*"
    image_files = _Files("image", images, image_suffix)
    label_files = _Files("label map", label_maps, _LABEL_SUFFIX)
    image_names = _names_by_stem(images, extensions)
    label_names = _names_by_stem(label_maps, (_LABEL_SUFFIX,))
    if not image_names:
      raise DataError(
        f"{images} has no images: they end in one of {' '.join(extensions)}"
      )
    _check_pairs(image_files, image_names, label_files, label_names)
    _check_pairs(label_files, label_names, image_files, image_names)
    # Arrays, because workers receive pickled copies.
    self._image_names = np.array([*image_names.values()], np.bytes_)
    self._label_names = np.array(
      [label_names[stem] for stem in image_names], np.bytes_
    )

  @property
  def num_classes(self) -> int:
    """The number of class names."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self._image_names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    image = decoding.read_image(self.path(index))
    with of_label_map():
      labels = decoding.read_image(
        self._label_maps / os.fsdecode(self._label_names[index])
      )
    return {
      "image": image,
      "labels": labels,
      "offset": self._offset,
      "ignored": self._ignored,
    }

  def image_size(self, index: int) -> tuple[int, int]:
    """Returns height and width of image `index`, in its EXIF orientation."""
    return decoding.read_upright_size(self.path(index))

  def path(self, index: int) -> pathlib.Path:
    """Returns the path of image `index`."""
    return self._images / os.fsdecode(self._image_names[index])

  def name(self, index: int) -> str:
    """Returns the path of image `index` as text."""
    return str(self.path(index))


class _Files(NamedTuple):
  """Files of one kind, for messages."""

  kind: str
  directory: pathlib.Path
  suffix: str


def read_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a text file, without white space around them.

  Empty lines at the end are left out.

  Raises:
    DataError: the file cannot be read, or is not UTF-8.
  """
  try:
    text = path.read_text("utf-8-sig")
  except OSError as error:
    raise DataError(f"cannot read {one_line(error)}") from error
  except UnicodeDecodeError as error:
    raise DataError(f"{path} is not UTF-8 text: {error}") from error
  return [line.strip() for line in text.rstrip().splitlines()]


def _names_by_stem(
  directory: pathlib.Path, extensions: tuple[str, ...]
) -> dict[str, bytes]:
  """Returns {path without suffix: path} of files, relative to the directory."""
  names: dict[str, bytes] = {}
  for path in list_images(directory, extensions)[0]:
    name = os.path.relpath(path, directory)
    stem = os.path.splitext(name)[0]
    if stem in names:
      raise DataError(
        f"{directory / os.fsdecode(names[stem])} and {path} differ in their"
        " suffix only, so that their pair is unclear: rename one"
      )
    names[stem] = os.fsencode(name)
  return names


def _check_pairs(
  files: _Files,
  names: Mapping[str, bytes],
  other_files: _Files,
  other_names: Mapping[str, bytes],
) -> None:
  """Checks that each file has its pair among the others."""
  alone = [stem for stem in names if stem not in other_names]
  if alone:
    stem = alone[0]
    raise DataError(
      f"{len(alone)} of {len(names)} {files.kind}s in {files.directory} have no"
      f" {other_files.kind}: add {other_files.directory / stem}"
      f"{other_files.suffix}, or remove"
      f" {files.directory / os.fsdecode(names[stem])}"
    )
