"""Decoding of label maps."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data.examples import WrongRecordError
from spatial_mamba_jax.data.label_maps import (
  IGNORED,
  make_palette,
  read_label_map,
)

VALUES = np.array([[0, 1, 2], [3, 1, 0]])


def encoded(image: Image.Image, format_name="PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, format_name, **options)
  return file.getvalue()


def grey(values, dtype=np.uint8) -> bytes:
  return encoded(Image.fromarray(np.asarray(values).astype(dtype)))


def palette(values, bits=8) -> bytes:
  image = Image.fromarray(np.asarray(values).astype(np.uint8), "P")
  image.putpalette(list(range(255, -1, -1)) * 3)
  return encoded(image, bits=bits)


def read(labels, num_classes=4, size=(2, 3), offset=0, ignored=255):
  record = {"labels": labels, "offset": offset, "ignored": ignored}
  return read_label_map(record, num_classes, size)


@pytest.mark.parametrize(
  "labels",
  [
    *(grey(VALUES), grey(VALUES, np.uint16), VALUES, VALUES.astype(np.uint8)),
    *(palette(VALUES), palette(VALUES, 4), palette(VALUES, 2)),
  ],
)
def test_reads_indices(labels):
  found = read(labels)
  assert found.dtype == np.int16
  np.testing.assert_array_equal(found, VALUES)


def test_reads_one_bit():
  values = VALUES == 1
  for labels in (encoded(Image.fromarray(values)), palette(values, 1)):
    np.testing.assert_array_equal(read(labels, 2), values)


def packed_png(values: np.ndarray, depth: int) -> bytes:
  """Encodes grey values of 2 or 4 bits, which Pillow does not write."""
  import struct
  import zlib

  def chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check

  height, width = values.shape
  rows = b""
  for row in values:
    bits = "".join(f"{x:0{depth}b}" for x in row)
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    rows += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
  header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows))
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_reads_packed_grey(depth):
  values = np.arange(6).reshape(2, 3) % 2**depth
  labels = packed_png(values, depth)
  np.testing.assert_array_equal(read(labels, 2**depth), values)


def test_offset_and_ignored():
  found = read(grey(VALUES), num_classes=3, offset=1, ignored=0)
  np.testing.assert_array_equal(found, VALUES - 1)
  assert found[0, 0] == IGNORED == -1
  found = read(grey(VALUES), num_classes=3, ignored=3)
  np.testing.assert_array_equal(found, np.where(VALUES == 3, -1, VALUES))
  # A value that is ignored is no class, even where it could be one.
  found = read(grey(VALUES), ignored=2)
  np.testing.assert_array_equal(found, np.where(VALUES == 2, -1, VALUES))


def test_deep_values():
  found = read(grey(VALUES + 30000, np.uint16), 30004, ignored=65535)
  np.testing.assert_array_equal(found, VALUES + 30000)
  values = np.where(VALUES == 3, 65535, VALUES)
  found = read(grey(values, np.uint16), 3, ignored=65535)
  np.testing.assert_array_equal(found, np.where(VALUES == 3, -1, VALUES))


@pytest.mark.parametrize(
  ("labels", "settings", "message"),
  [
    (
      grey(VALUES),
      {"num_classes": 2},
      "has the value 2 in 1 pixels and 1 more such values: 2 classes have the "
      "values 0 to 1, and pixels without a class have 255",
    ),
    (
      grey(VALUES),
      {"num_classes": 3},
      "has the value 3 in 1 pixels: 3 classes have the values 0 to 2,",
    ),
    # What would be the label -1 by its offset is no ignored pixel.
    (
      grey(VALUES),
      {"offset": 1},
      "has the value 0 in 2 pixels: 4 classes have",
    ),
    (
      grey(VALUES),
      {"size": (3, 2)},
      "has 3 x 2 pixels and the image, upright, 2 x 3: save",
    ),
    (
      encoded(Image.new("RGB", (3, 2))),
      {},
      "has the mode RGB: save it as grey or palette PNG",
    ),
    (encoded(Image.new("LA", (3, 2))), {}, "has the mode LA:"),
    (
      encoded(Image.new("F", (3, 2)), "TIFF"),
      {},
      "is a TIFF file: save it as PNG",
    ),
    (encoded(Image.new("L", (3, 2)), "JPEG"), {}, "is a JPEG file:"),
    (VALUES / 2, {}, r"must be integers [H, W], got float64 (2, 3)"),
    (VALUES[None], {}, r"must be integers [H, W], got int64 (1, 2, 3)"),
  ],
)
def test_wrong_maps(labels, settings, message):
  with pytest.raises(WrongRecordError, match=re.escape(message)) as caught:
    read(labels, **settings)
  assert str(caught.value).startswith("its label map ")


@pytest.mark.parametrize("content", [b"", b"<html>", grey(VALUES)[:40]])
def test_what_cannot_be_decoded_is_unreadable(content):
  message = r"its label map cannot be read: \w"
  with pytest.raises(ValueError, match=message) as caught:
    read(content)
  assert not isinstance(caught.value, WrongRecordError)


def test_colours_are_distinct():
  colours = make_palette(150)
  assert colours.shape == (150, 3)
  assert colours.dtype == np.uint8
  difference = np.abs(colours[:, None].astype(int) - colours).max(-1)
  assert difference[~np.eye(150, dtype=bool)].min() >= 16
  np.testing.assert_array_equal(make_palette(7), colours[:7])
  many = make_palette(2**15 - 1)
  assert len(np.unique(many, axis=0)) == len(many)
