"""ADE20K for scene parsing: ADEChallengeData2016, as it is downloaded.

It comes from the MIT Scene Parsing Benchmark, in ADEChallengeData2016.zip:

    images/{training,validation}/*.jpg
    annotations/{training,validation}/*.png
    objectInfo150.txt
"""

import pathlib

from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.data.image_pairs import ImagePairs, read_lines
from spatial_mamba_jax.paths import local_path

_NAME = "ADEChallengeData2016"
_CLASSES = "objectInfo150.txt"
_NUM_CLASSES = 150
_DIRECTORIES = {"train": "training", "validation": "validation"}


def open_split(config: DataConfig, split: str) -> ImagePairs:
  """Opens one split; `config.data_dir` is ADEChallengeData2016 or its parent.

  Raises:
    DataError: something is missing or malformed.
  """
  if not config.data_dir:
    raise DataError(f"config.data.data_dir must name the directory {_NAME}")
  root = _find_root(local_path(config.data_dir, "config.data.data_dir"))
  classes = read_classes(root / _CLASSES)
  images, label_maps = (
    root / kind / _DIRECTORIES[split] for kind in ("images", "annotations")
  )
  # 0 is what belongs to no class.
  return ImagePairs(
    images, label_maps, classes, offset=1, ignored=0, extensions=(".jpg",)
  )


def read_classes(path: pathlib.Path) -> list[str]:
  """Returns the class names by label: the first synonym of each.

  Args:
    path: a table, separated by tabs, with the columns Idx and Name.

  Raises:
    DataError: the file is missing or malformed.
  """
  header, *rows = [
    [cell.strip() for cell in line.split("\t")] for line in read_lines(path)
  ] or [[]]
  if not {"Idx", "Name"} <= set(header):
    raise DataError(
      f"{path} must be a table with the columns Idx and Name, separated by"
      f" tabs: unpack it again from {_NAME}.zip"
    )
  index, name = header.index("Idx"), header.index("Name")
  classes = []
  for number, row in enumerate(rows, 1):
    cells = dict(enumerate(row))
    classes.append(cells.get(name, "").split(",")[0].strip())
    if cells.get(index) != str(number) or not classes[-1]:
      raise DataError(
        f"line {number + 1} of {path} must have the Idx {number} and a Name:"
        f" unpack it again from {_NAME}.zip"
      )
  if len(classes) != _NUM_CLASSES:
    raise DataError(
      f"{path} has {len(classes)} classes of {_NUM_CLASSES}: unpack it again"
      f" from {_NAME}.zip"
    )
  return classes


def _find_root(directory: pathlib.Path) -> pathlib.Path:
  for root in (directory, directory / _NAME):
    if (root / "images").is_dir() and (root / "annotations").is_dir():
      return root
  raise DataError(
    f"config.data.data_dir={directory} must be {_NAME}, which holds images/,"
    f" annotations/ and {_CLASSES}: unpack {_NAME}.zip there"
  )
