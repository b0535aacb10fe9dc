"""Draws images with their label maps and predictions, side by side.

This is a module of its own, because it needs Pillow, matplotlib and SciPy.
150 colours cannot be told apart, so large regions have the names of their
classes written into them.

Axis letters: H and W height and width in the picture, K classes.
"""

import functools
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from spatial_mamba_jax.data.decoding import decode_upright
from spatial_mamba_jax.data.label_maps import IGNORED
from spatial_mamba_jax.data.sources import SegmentedSource
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.tasks.segmentation.evaluation import (
  LabelMaps,
  PackedMaps,
  PixelCounts,
)

# Number of images in `draw_examples`, and width of their panels in pixels. A
# phone shows two panels side by side, with names that are just legible.
_EXAMPLES, _EXAMPLE_WIDTH = 4, 400
# Greatest height of a panel, in widths.
_MAX_ASPECT = 1.5
# Size of the letters, height of a line of text, margin, and width of the
# outline of letters in a label map, in pixels.
_LETTERS, _LINE, _MARGIN, _OUTLINE = 22, 32, 8, 2
# Most classes in a legend, and most letters of a class's name.
_LEGEND_CLASSES, _NAME_LETTERS = 24, 24
# Side of the map in which places for names are searched, in pixels.
_SEARCH_SIDE = 160
# Side of the squares where there is no label; period of the stripes on errors.
_SQUARE, _STRIPES = 8, 10
_BLACK, _WHITE, _GREY = (0, 0, 0), (255, 255, 255), (190, 190, 190)
# Weights of red, green and blue in the brightness of a pixel (Rec. 601), and
# the brightness below which a colour is dark.
_LUMA, _DARK = np.array([0.299, 0.587, 0.114]), 110
_FRAME = (118, 118, 118)
# Yellow of Okabe and Ito: with black, a contrast for every eye.
_YELLOW = (240, 228, 66)


class Example(NamedTuple):
  """An image with its label maps.

  Attributes:
    name: the image's name.
    photo: RGB; None if the image cannot be read.
    maps: its label maps.
  """

  name: str
  photo: Image.Image | None
  maps: LabelMaps


def read_example(
  source: SegmentedSource, maps: PackedMaps, index: int
) -> Example:
  """Reads an image of a source."""
  try:
    photo = decode_upright(source[index]["image"])
  except Exception:  # Its type depends on source and format.
    photo = None
  return Example(source.name(index), photo, maps[index])


def draw_examples(
  title: str, maps: PackedMaps, source: SegmentedSource
) -> bytes:
  """Draws a few images, evenly spaced in the source.

  Returns:
    A PNG file; `title` is above the images and in the file's metadata.
  """
  indices = maps.indices
  count = min(_EXAMPLES, len(indices))
  chosen = [indices[i * len(indices) // count] for i in range(count)]
  drawn = [
    draw_example(
      read_example(source, maps, index),
      source.classes,
      source.palette,
      _EXAMPLE_WIDTH,
    )
    for index in chosen
  ]
  width = _sheet_width(_EXAMPLE_WIDTH)
  height = 2 * _LINE + sum(each.height + _LINE for each in drawn)
  sheet = Image.new("RGB", (width, height), _WHITE)
  _write(sheet, (_MARGIN, _MARGIN), _fitting(title, width - 2 * _MARGIN))
  top = 2 * _LINE
  for each in drawn:
    sheet.paste(each, (0, top))
    top += each.height + _LINE
  information, file = PngInfo(), io.BytesIO()
  information.add_itxt("Title", one_line(title))
  sheet.save(file, "PNG", pnginfo=information)
  return file.getvalue()


def draw_example(
  example: Example, classes: Sequence[str], palette: np.ndarray, width: int
) -> Image.Image:
  """Draws an image, its label map, its prediction and the wrong pixels.

  Args:
    example: the image.
    classes: the class names, by label.
    palette: a colour for each class, uint8 [K, 3].
    width: width of each of the four panels, in pixels.
  """
  names = [_short(name) for name in classes]
  counts = PixelCounts.of(example.maps, len(names))
  panels = _panels(example, names, palette, width)
  errors = f"wrong, striped: {1 - counts.pixel_accuracy:.1%}"
  captions = (
    "image" if example.photo else "image: cannot be read",
    "label",
    "prediction",
    errors if counts.labelled.any() else "no pixel has a label",
  )
  sheet_width = _sheet_width(width)
  legend = _legend(example.maps, counts, names, palette, sheet_width)
  cell = _LINE + panels[0].height + _MARGIN
  size = (sheet_width, _LINE + 2 * cell + legend.height)
  sheet = Image.new("RGB", size, _WHITE)
  title = _fitting(one_line(example.name), sheet_width - 2 * _MARGIN)
  _write(sheet, (_MARGIN, 0), title)
  for i, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
    left = _MARGIN + i % 2 * (width + _MARGIN)
    top = _LINE + i // 2 * cell
    _write(sheet, (left, top), _fitting(caption, width))
    box = left, top + _LINE, left + panel.width, top + _LINE + panel.height
    _frame(sheet, box)
    sheet.paste(panel, box)
  sheet.paste(legend, (0, _LINE + 2 * cell))
  return sheet


def _sheet_width(width: int) -> int:
  return 2 * width + 3 * _MARGIN


def _panels(
  example: Example, names: Sequence[str], palette: np.ndarray, width: int
) -> list[Image.Image]:
  height, original = example.maps.label.shape
  scale = min(width / original, _MAX_ASPECT * width / height)
  size = max(1, round(scale * original)), max(1, round(scale * height))
  maps = LabelMaps(*(_resized(each, size) for each in example.maps))
  photo = example.photo or Image.new("RGB", (1, 1), _GREY)
  photo = photo.resize(size, Image.Resampling.BILINEAR)
  return [
    photo,
    _draw_map(maps.label, names, palette),
    _draw_map(maps.predicted, names, palette),
    _draw_errors(photo, maps),
  ]


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Returns the nearest labels; `size` is (width, height)."""
  columns, rows = (
    np.arange(new) * old // new
    for new, old in zip(size, labels.shape[::-1], strict=True)
  )
  return labels[rows[:, None], columns]


def _draw_map(
  labels: np.ndarray, names: Sequence[str], palette: np.ndarray
) -> Image.Image:
  """Draws classes in their colours, with outlines and names."""
  pixels = palette[labels]
  outline = _is_outline(labels)
  # Black would not be seen beside dark colours.
  is_dark = _darkest_neighbour(labels, palette)[outline] < _DARK
  pixels[outline] = np.where(is_dark[:, None], _WHITE, _BLACK)
  _draw_squares(pixels, labels == IGNORED)
  panel = Image.fromarray(pixels)
  for text, corner in _name_places(labels, names):
    _write(
      panel,
      corner,
      text,
      fill=_WHITE,
      stroke_width=_OUTLINE,
      stroke_fill=_BLACK,
    )
  return panel


def _draw_errors(photo: Image.Image, maps: LabelMaps) -> Image.Image:
  """Draws stripes where the prediction is wrong, on the pale image."""
  pale = 160 + np.asarray(photo.convert("L")) // 8 * 3
  pixels = np.repeat(pale[..., None], 3, axis=-1)
  row, column = np.ogrid[: photo.height, : photo.width]
  is_dark = (row + column) % _STRIPES < _STRIPES // 2
  is_wrong = maps.predicted != maps.label
  pixels[is_wrong & is_dark] = _BLACK
  pixels[is_wrong & ~is_dark] = _YELLOW
  _draw_squares(pixels, maps.label == IGNORED)
  return Image.fromarray(pixels)


def _draw_squares(pixels: np.ndarray, where: np.ndarray) -> None:
  """Draws the pattern of pixels without a label, in place."""
  row, column = np.ogrid[: where.shape[0], : where.shape[1]]
  is_dark = (row // _SQUARE + column // _SQUARE) % 2 == 0
  pixels[where] = 255
  pixels[where & is_dark] = 205


def _is_outline(labels: np.ndarray) -> np.ndarray:
  """[H, W], whether the pixel to the right or below has another class."""
  right = labels != np.roll(labels, -1, axis=1)
  below = labels != np.roll(labels, -1, axis=0)
  right[:, -1] = below[-1] = False
  return right | below


def _darkest_neighbour(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """[H, W], the lowest brightness of a pixel and of those right and below."""
  brightness = (palette @ _LUMA)[labels]
  brightness[labels == IGNORED] = 255
  darkest = brightness.copy()
  for axis in (0, 1):
    np.minimum(darkest, np.roll(brightness, -1, axis), out=darkest)
  return darkest


def _name_places(
  labels: np.ndarray, names: Sequence[str]
) -> Iterator[tuple[str, tuple[int, int]]]:
  """Yields the names that fit into their regions, and where to write them.

  A name is in the middle of the largest circle inside of its class.
  """
  height, width = labels.shape
  step = max(1, max(height, width) // _SEARCH_SIDE)
  small = np.pad(labels[::step, ::step], 1, constant_values=IGNORED)
  taken: list[tuple[float, float, float, float]] = []
  for label in _by_area(small):
    distances = np.asarray(ndimage.distance_transform_edt(small == label))
    radius = step * float(distances.max())
    row, column = divmod(int(distances.argmax()), small.shape[1])
    text_width = _font().getlength(names[label])
    room = width - text_width - 2 * _OUTLINE, float(height - _LINE)
    if radius < 0.6 * _LETTERS or text_width > 3 * radius or min(room) < 0:
      continue
    left = step * (column - 1) - text_width / 2
    left = min(max(0.0, left), room[0]) + _OUTLINE
    top = min(max(0.0, step * (row - 1) - _LINE / 2), room[1])
    box = left, top, left + text_width, top + _LINE
    if not any(_overlap(box, other) for other in taken):
      taken.append(box)
      yield names[label], (round(left), round(top))


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _by_area(labels: np.ndarray) -> list[int]:
  """Returns the classes present, the largest first."""
  present, counts = np.unique(labels[labels != IGNORED], return_counts=True)
  return present[np.argsort(-counts, kind="stable")].tolist()


def _legend(
  maps: LabelMaps,
  counts: PixelCounts,
  names: Sequence[str],
  palette: np.ndarray,
  width: int,
) -> Image.Image:
  """Draws the colours, names and IoU of the classes in an image."""
  present = _by_area(np.stack(maps))
  entries: list[tuple[str, np.ndarray | None]] = [("IoU in this image:", None)]
  for label in present[:_LEGEND_CLASSES]:
    iou = counts.iou[label]
    share = "" if np.isnan(iou) else f": {iou:.0%}"
    sample = np.full((_LETTERS, _LETTERS, 3), palette[label])
    entries.append((names[label] + share, sample))
  if (hidden := len(present) - _LEGEND_CLASSES) > 0:
    entries.append((f"and {hidden} more", None))
  if (maps.label == IGNORED).any():
    sample = np.zeros((_LETTERS, _LETTERS, 3), np.uint8)
    _draw_squares(sample, np.full(sample.shape[:2], True))
    entries.append(("no label", sample))
  return _flow(entries, width)


def _flow(
  entries: Sequence[tuple[str, np.ndarray | None]], width: int
) -> Image.Image:
  """Writes texts in lines, each after its sample of a colour, if any."""
  places, left, top = [], _MARGIN, 0
  for text, sample in entries:
    shift = 0 if sample is None else _LETTERS + _MARGIN
    entry_width = shift + round(_font().getlength(text)) + 2 * _MARGIN
    if left + entry_width > width and left > _MARGIN:
      left, top = _MARGIN, top + _LINE
    places.append((left, top, shift))
    left += entry_width
  drawn = Image.new("RGB", (width, top + _LINE), _WHITE)
  for (text, sample), (left, top, shift) in zip(entries, places, strict=True):
    if sample is not None:
      corner = left, top + (_LINE - _LETTERS) // 2
      _frame(drawn, (*corner, corner[0] + _LETTERS, corner[1] + _LETTERS))
      drawn.paste(Image.fromarray(sample), corner)
    _write(drawn, (left + shift, top), text)
  return drawn


def _frame(image: Image.Image, box: tuple[int, int, int, int]) -> None:
  """Draws a line around a box, so that pale colours end on white."""
  left, top, right, bottom = box
  around = left - 1, top - 1, right, bottom
  ImageDraw.Draw(image).rectangle(around, outline=_FRAME)


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
  # Matplotlib's font has letters of more languages than Pillow's.
  path = pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
  basic = ImageFont.Layout.BASIC  # The other layout is not always installed.
  return ImageFont.truetype(path, _LETTERS, layout_engine=basic)


def _write(
  image: Image.Image, corner: tuple[int, int], text: str, **style: Any
) -> None:
  """Writes a line of text, `_LINE` pixels high, from its top left corner."""
  middle = corner[0], corner[1] + _LINE // 2
  style = {"fill": _BLACK, **style}
  ImageDraw.Draw(image).text(middle, text, font=_font(), anchor="lm", **style)


def _short(name: str) -> str:
  """Returns a class's name as one printable line of a few letters."""
  name = one_line(name)
  if len(name) <= _NAME_LETTERS:
    return name
  return f"{name[: _NAME_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"


def _fitting(text: str, width: int) -> str:
  """Returns a text that fits into a width; its end is kept."""
  if _font().getlength(text) <= width:
    return text
  ellipsis = "\N{HORIZONTAL ELLIPSIS}"
  while text and _font().getlength(ellipsis + text) > width:
    text = text[1:]
  return ellipsis + text
