"""A tree of image files, one directory for each class."""

import collections
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from spatial_mamba_jax.data import decoding
from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.paths import local_path

# Suffixes of the files that are read, in lower case.
EXTENSIONS = tuple(sorted(sum(decoding.FORMATS.values(), ())))
_DIRECTORIES = {"train": ("train",), "validation": ("val", "validation")}
# Lower-case names of directories that are no classes: file systems, network
# storage and archives create them. Names that begin with a dot are skipped too.
_SYSTEM_DIRECTORIES = frozenset(
  (
    "#recycle", "#snapshot", "$recycle.bin", "@__thumb", "@eadir",
    "@recently-snapshot", "@recycle", "@synoeastream", "@tmp", "__macosx",
    "__pycache__", "lost+found", "network trash folder", "recycled", "recycler",
    "system volume information", "temporary items", "thevolumesettingsfolder",
    "~snapshot",
  )
)  # fmt: skip
# Most names in a message.
_MAX_SHOWN = 5


class ImageFolder:
  """`ROOT/<class>/**/<image>`, as torchvision's ImageFolder reads it.

  A label is the index of its class name in sorted order; within a class, files
  are sorted by path. Hidden files and directories are skipped, and so are the
  directories of file systems and network storage (`@eaDir`, `lost+found`, ...).
  Links are followed, but each directory is read once within a class.

  Attributes:
    classes: the class names, by label.
  """

  def __init__(self, root: pathlib.Path, extensions: tuple[str, ...]):
    """Lists the files that end in one of `extensions`, which are lower-case.

    Logs the classes without images, and the suffixes of skipped files.
    """
    self.root = root
    self.classes = list_classes(root)
    names, labels = [], []
    skipped: collections.Counter[str] = collections.Counter()
    for label, class_name in enumerate(self.classes):
      directory = root / class_name
      found, others = list_images(directory, extensions)
      prefix = len(str(directory)) - len(class_name)
      names += [os.fsencode(path[prefix:]) for path in found]
      labels += [label] * len(found)
      skipped += others
    # Two arrays, because workers receive pickled copies of a million names.
    self._names = np.array(names, dtype=np.bytes_)
    self.labels = np.array(labels, dtype=np.int32)
    self._log_missing(skipped)

  def _log_missing(self, skipped: collections.Counter[str]) -> None:
    counts = np.bincount(self.labels, minlength=len(self.classes))
    empty = [self.classes[label] for label in np.flatnonzero(counts == 0)]
    if empty and len(self):
      logging.warning(
        "%s: no images of %d of %d classes: %s",
        one_line(self.root),
        len(empty),
        len(self.classes),
        _shortened(empty),
      )
    if skipped:
      logging.warning(
        "%s: files skipped for their suffix: %s",
        one_line(self.root),
        _shortened([f"{n} {suffix}" for suffix, n in skipped.most_common()]),
      )

  @property
  def num_classes(self) -> int:
    """The number of class directories."""
    return len(self.classes)

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self.path(index)
    return {
      "image": decoding.read_image(path),
      "label": int(self.labels[index]),
      # Bytes, because names may be in any encoding.
      "file_name": os.fsencode(path.name),
    }

  def path(self, index: int) -> pathlib.Path:
    """Returns the path of image `index`."""
    return self.root / os.fsdecode(self._names[index])

  def name(self, index: int) -> str:
    """Returns the path of image `index` as text."""
    return str(self.path(index))


def list_classes(root: pathlib.Path) -> list[str]:
  """Returns the sorted names of the class directories in `root`."""
  return sorted(
    entry.name
    for entry in os.scandir(root)
    if _is_directory(entry) and not _is_left_out(entry.name)
  )


def find_splits(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns {split: directory} of the splits that exist.

  Raises:
    DataError: the splits' class directories differ, so that labels would.
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
        f"{_shortened(differing)}"
      )
  return splits


def open_tree(
  root: pathlib.Path, split: str, extensions: tuple[str, ...] = EXTENSIONS
) -> ImageFolder:
  """Opens one split of the tree in `root`.

  Raises:
    DataError: the split is missing or empty, or the splits' classes differ.
    OSError: a directory cannot be read.
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
    raise DataError("config.data.data_dir must name the image_folder's root")
  return open_tree(local_path(config.data_dir, "config.data.data_dir"), split)


def list_images(
  root: pathlib.Path, extensions: tuple[str, ...] = EXTENSIONS
) -> tuple[list[str], collections.Counter[str]]:
  """Lists the image files anywhere in a directory.

  Args:
    root: the directory.
    extensions: the images' suffixes, in lower case.

  Returns:
    The sorted paths, which begin with `root` (strings, because there may be a
    million); and the number of other files, by suffix.

  Raises:
    OSError: a directory cannot be read.
  """
  images = []
  others: collections.Counter[str] = collections.Counter()
  for entry in _walk(root):
    if entry.name.lower().endswith(extensions):
      images.append(entry.path)
    else:
      suffix = os.path.splitext(entry.name)[1].lower()
      others[suffix or "without a suffix"] += 1
  return sorted(images), others


def _walk(root: pathlib.Path) -> Iterator[os.DirEntry[str]]:
  """Yields files that are not hidden. Reads each directory once, links last."""
  # A link to a directory above `root` would bring in other classes.
  seen = {
    _identity(above)
    for path in (os.path.abspath(root), os.path.realpath(root))
    for above in pathlib.Path(path).parents
  }
  directories, links = [str(root)], []
  while directories or links:
    directory = directories.pop() if directories else links.pop(0)
    identity = _identity(directory)
    if identity in seen:
      continue
    seen.add(identity)
    with os.scandir(directory) as entries:
      for entry in sorted(entries, key=lambda entry: entry.name):
        if _is_directory(entry):
          if not _is_left_out(entry.name):
            (links if entry.is_symlink() else directories).append(entry.path)
        elif not entry.name.startswith(".") and _may_be_read(entry):
          yield entry


def _identity(directory: str | pathlib.Path) -> tuple[int, int]:
  status = os.stat(directory)
  return status.st_dev, status.st_ino


def _is_directory(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # For example, a link to itself.
    return False


def _may_be_read(entry: os.DirEntry[str]) -> bool:
  """Returns whether it is a file, or a broken link (an unreadable image).

  Devices and pipes have no end.
  """
  if entry.is_symlink():
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)
  return entry.is_file()


def _is_left_out(directory: str) -> bool:
  return directory.startswith(".") or directory.lower() in _SYSTEM_DIRECTORIES


def _shortened(names: list[str]) -> str:
  shown = ", ".join(map(one_line, names[:_MAX_SHOWN]))
  return f"{shown}, ..." if len(names) > _MAX_SHOWN else shown
