"""Writes predictions: a table of classes, label maps, and pictures of them.

This is a module of its own, because it needs Pillow and matplotlib.
"""

import collections
import concurrent.futures
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from spatial_mamba_jax.data.decoding import FORMATS
from spatial_mamba_jax.data.sources import SegmentedSource
from spatial_mamba_jax.errors import naming
from spatial_mamba_jax.paths import make_directory
from spatial_mamba_jax.tasks.segmentation.evaluation import (
  PackedMaps,
  PixelCounts,
)
from spatial_mamba_jax.tasks.segmentation.pictures import (
  draw_example,
  read_example,
)
from spatial_mamba_jax.tasks.tables import write_csv

# Most colours of a PNG file's palette.
_PALETTE_COLOURS = 256
# Width of each of the four panels of a picture, in pixels.
_WIDTH = 512
# Most bytes of a part of a path, which leave room for an index and a suffix.
_PART_BYTES = 200
# Printable characters that some file system reserves, and the two that
# `file_stems` writes itself.
_RESERVED = frozenset('\\:*?"<>|%~')
_MAP, _PICTURE = ".png", ".jpg"


def write_predictions(
  directory: pathlib.Path,
  counts: PixelCounts,
  maps: PackedMaps,
  source: SegmentedSource,
) -> None:
  """Writes files into an existing directory.

  `per_class.csv`: a line for each class: its label, name, IoU, accuracy, and
    the number of pixels that are labelled and predicted as the class. A class
    that is absent has no IoU; one without a label has no accuracy.
  `maps/NAME.png`: the predicted classes of an image. The pixels are indices
    into the source's palette; with more than 256 classes, 16-bit grey values.
  `overlays/NAME.jpg`: the image, its label map, the prediction and the wrong
    pixels, side by side.

  NAME is the path of the image in the directory that all images are in; see
  `file_stems`.

  Raises:
    OSError: a file cannot be written.
  """
  rows = _class_rows(counts, source.classes)
  write_csv(directory / "per_class.csv", rows)
  names = [source.name(index) for index in range(len(source))]
  stems = file_stems(in_common_directory(names))

  def write(index: int) -> None:
    example = read_example(source, maps, index)
    label_map = _map_image(example.maps.predicted, source.palette)
    _save(label_map, directory / "maps" / f"{stems[index]}{_MAP}")
    picture = draw_example(example, source.classes, source.palette, _WIDTH)
    path = directory / "overlays" / f"{stems[index]}{_PICTURE}"
    # Without subsampling, which would blur the edges of classes.
    _save(picture, path, quality=80, subsampling=0)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for _ in pool.map(write, maps.indices):
      pass  # Raises what `write` raised.


def file_stems(names: Sequence[str]) -> list[str]:
  """Returns a relative path without suffix for each image of a source.

  The paths are distinct, also where case is ignored. A character that is not
  printable, or that some system reserves, becomes `%` and the hexadecimal
  number of each of its bytes. Where several names would have the same path,
  `~` and the image's index follow.
  """
  stems = [_stem(name) for name in names]
  keys = [unicodedata.normalize("NFD", stem.casefold()) for stem in stems]
  uses = collections.Counter(keys)
  return [
    stem if stem and uses[key] == 1 else f"{stem}~{index}"
    for index, (stem, key) in enumerate(zip(stems, keys, strict=True))
  ]


def in_common_directory(names: Sequence[str]) -> Sequence[str]:
  """Returns the names, relative to their directory if they are paths."""
  if not all(map(os.path.isabs, names)):
    return names
  directory = os.path.commonpath([os.path.dirname(name) for name in names])
  return [os.path.relpath(name, directory) for name in names]


def _stem(name: str) -> str:
  for suffix in sum(FORMATS.values(), ()):
    if name.casefold().endswith(suffix):
      name = name[: -len(suffix)]
      break
  *parents, last = [_safe(part) for part in name.split("/") if part] or [""]
  # A file of another image could have the name of such a directory.
  parents = [
    f"{part}~" if part.casefold().endswith((_MAP, _PICTURE)) else part
    for part in parents
  ]
  return "/".join((*parents, last))


def _safe(part: str) -> str:
  """Escapes characters; also a dot at the start, which would hide the file."""
  escaped = "".join(
    _escaped(c)
    if c in _RESERVED or not c.isprintable() or (c == "." and not i)
    else c
    for i, c in enumerate(part)
  )
  return escaped.encode()[:_PART_BYTES].decode(errors="ignore")


def _escaped(character: str) -> str:
  octets = character.encode(errors="surrogatepass")
  return "".join(f"%{octet:02X}" for octet in octets)


def _class_rows(
  counts: PixelCounts, classes: Sequence[str]
) -> Iterable[Sequence[Any]]:
  yield ("label", "class", "iou", "accuracy", "labelled", "predicted")
  shares = [
    ["" if np.isnan(x) else x for x in values.tolist()]
    for values in (counts.iou, counts.accuracy)
  ]
  yield from zip(
    range(len(classes)),
    classes,
    *shares,
    counts.labelled.tolist(),
    counts.predicted.tolist(),
    strict=True,
  )


def _map_image(predicted: np.ndarray, palette: np.ndarray) -> Image.Image:
  if len(palette) > _PALETTE_COLOURS:
    return Image.fromarray(predicted.astype(np.uint16))
  image = Image.fromarray(predicted.astype(np.uint8))
  image.putpalette(palette.tobytes())
  return image


def _save(image: Image.Image, path: pathlib.Path, **options: Any) -> None:
  make_directory(path.parent)
  with naming(path):
    image.save(path, **options)
