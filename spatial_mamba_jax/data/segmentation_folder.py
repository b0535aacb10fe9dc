"""A folder of images with their label maps.

    ROOT/images/{train,val}/**          images
    ROOT/labels/{train,val}/**.png      label maps: the same path, other suffix
    ROOT/classes.txt                    one class name a line

A label map has one index a pixel: the number of the class's line, from 0 on, or
`config.data.ignored_label`.
"""

import pathlib

from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.data.image_pairs import ImagePairs, read_lines
from spatial_mamba_jax.paths import local_path

_CLASSES = "classes.txt"
_DIRECTORIES = {"train": ("train",), "validation": ("val", "validation")}


def open_split(config: DataConfig, split: str) -> ImagePairs:
  """Opens one split of the folder `config.data_dir`.

  Raises:
    DataError: something is missing or malformed.
  """
  if not config.data_dir:
    raise DataError(
      "config.data.data_dir must name the segmentation_folder's root"
    )
  root = local_path(config.data_dir, "config.data.data_dir")
  classes = _read_classes(root / _CLASSES)
  if config.ignored_label < len(classes):
    raise DataError(
      f"config.data.ignored_label={config.ignored_label} is also the class"
      f" {classes[config.ignored_label]} of {root / _CLASSES}: choose a value"
      f" from {len(classes)} on"
    )
  images, label_maps = (
    _find_split(root / kind, split) for kind in ("images", "labels")
  )
  return ImagePairs(
    images, label_maps, classes, offset=0, ignored=config.ignored_label
  )


def _read_classes(path: pathlib.Path) -> list[str]:
  classes = read_lines(path)
  if not classes:
    raise DataError(f"{path} is empty: write one class name a line")
  seen: set[str] = set()
  for number, name in enumerate(classes, 1):
    if not name or name in seen:
      problem = f"repeats the class {name}" if name else "is empty"
      raise DataError(
        f"line {number} of {path} {problem}: write one class name a line"
      )
    seen.add(name)
  return classes


def _find_split(directory: pathlib.Path, split: str) -> pathlib.Path:
  for name in _DIRECTORIES[split]:
    if (directory / name).is_dir():
      return directory / name
  expected = " or ".join(f"{name}/" for name in _DIRECTORIES[split])
  raise DataError(f"there is no directory {expected} in {directory}")
