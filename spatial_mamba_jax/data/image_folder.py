"""A tree of image files, one directory for each class."""

import os
import pathlib
from typing import Any

import numpy as np

from spatial_mamba_jax.data.config import DataConfig, DataError

EXTENSIONS = (
  ".bmp",
  ".jpeg",
  ".jpg",
  ".pgm",
  ".png",
  ".ppm",
  ".tif",
  ".tiff",
  ".webp",
)
_DIRECTORIES = {"train": ("train",), "validation": ("val", "validation")}


class ImageFolder:
  """`ROOT/<class>/**/<image>`, as torchvision's ImageFolder reads it.

  Labels count the sorted class names; within a class files are sorted by path.

  Attributes:
    classes: the class names, by label.
  """

  def __init__(self, root: pathlib.Path, extensions: tuple[str, ...]):
    """Lists the files; `extensions` are those of images, in lower case."""
    self.root = root
    self.classes = list_classes(root)
    names, labels = [], []
    for label, class_name in enumerate(self.classes):
      found = sorted(_list_images(root, class_name, extensions))
      names += [os.fsencode(name) for name in found]
      labels += [label] * len(found)
    # Two arrays rather than a million objects, for the workers' pickled copies.
    self._names = np.array(names, dtype=np.bytes_)
    self.labels = np.array(labels, dtype=np.int32)

  @property
  def num_classes(self) -> int:
    """The number of class directories."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {
      "image": self.path(index).read_bytes(),
      "label": int(self.labels[index]),
    }

  def path(self, index: int) -> pathlib.Path:
    """The file of image `index`."""
    return self.root / os.fsdecode(self._names[index])

  def name(self, index: int) -> str:
    """The path of image `index`."""
    return str(self.path(index))


def list_classes(root: pathlib.Path) -> list[str]:
  """The sorted names of the directories in `root`."""
  return sorted(
    entry.name
    for entry in os.scandir(root)
    if entry.is_dir() and not entry.name.startswith(".")
  )


def find_splits(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """The directories of the splits that are there, by split name.

  Raises:
    DataError: if their class directories differ, because their labels would.
  """
  splits = {}
  for split, names in _DIRECTORIES.items():
    found = [root / name for name in names if (root / name).is_dir()]
    if found:
      splits[split] = found[0]
  if len(splits) == 2:
    train, validation = (set(list_classes(path)) for path in splits.values())
    if train != validation:
      differing = sorted(train ^ validation)
      raise DataError(
        f"{splits['train']} and {splits['validation']} must have the same "
        f"class directories, but {len(differing)} are in one of them only: "
        f"{', '.join(differing[:5])}"
      )
  return splits


def open_tree(
  root: pathlib.Path, split: str, extensions: tuple[str, ...] = EXTENSIONS
) -> ImageFolder:
  """Opens one split of the tree in `root`.

  Raises:
    DataError: if the split is missing or empty, or the splits' classes differ.
  """
  splits = find_splits(root)
  if split not in splits:
    expected = " or ".join(f"{name}/" for name in _DIRECTORIES[split])
    raise DataError(f"there is no directory {expected} in {root}")
  images = ImageFolder(splits[split], extensions)
  if not len(images):
    raise DataError(
      f"{splits[split]} has no images: they belong in {splits[split]}/<class>/ "
      f"and end in one of {' '.join(extensions)}"
    )
  return images


def open_split(config: DataConfig, split: str) -> ImageFolder:
  """Opens one split of the tree in `config.data_dir`."""
  if not config.data_dir:
    raise DataError("data.data_dir must name the root of the image_folder")
  return open_tree(pathlib.Path(config.data_dir).expanduser(), split)


def _list_images(
  root: pathlib.Path, class_name: str, extensions: tuple[str, ...]
) -> list[str]:
  """Paths relative to `root`; strings, because there may be a million."""
  prefix = len(os.path.join(root, ""))
  return [
    os.path.join(directory, name)[prefix:]
    for directory, _, names in os.walk(root / class_name, followlinks=True)
    for name in names
    if name.lower().endswith(extensions) and not name.startswith(".")
  ]
