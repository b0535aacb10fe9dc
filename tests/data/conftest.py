import io
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

CLASSES = ("n01440764", "n02102040", "n03000684")


def encode(image: Image.Image, file_format: str = "JPEG") -> bytes:
  encoded = io.BytesIO()
  image.save(encoded, file_format)
  return encoded.getvalue()


def smooth_image(rng: np.random.Generator, width: int, height: int):
  """Something that JPEG keeps nearly as it is, unlike noise."""
  corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
  return Image.fromarray(corners).resize((width, height))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """3 classes, 4 training and 3 validation images each, in several modes."""
  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split, count in (("train", 4), ("val", 3)):
    for class_name in CLASSES:
      directory = root / split / class_name
      directory.mkdir(parents=True)
      for i, mode in enumerate(("RGB", "L", "CMYK", "RGB")[:count]):
        width, height = rng.integers(20, 60, 2)
        image = smooth_image(rng, width, height).convert(mode)
        name = f"{class_name}_{split}_{i}.JPEG"
        (directory / name).write_bytes(encode(image))
  return root


@pytest.fixture
def break_image() -> Callable[[pathlib.Path, str], None]:
  """Spoils a file in one of the ways in which files get spoilt."""

  def spoil(path: pathlib.Path, how: str) -> None:
    content = path.read_bytes()
    match how:
      case "missing":
        path.unlink()
      case "empty":
        path.write_bytes(b"")
      case "truncated":
        path.write_bytes(content[: len(content) // 2])
      case "not an image":
        path.write_bytes(b"<html>404</html>" * 100)
      case "bomb":
        huge = bytearray(encode(Image.new("L", (1, 1)), "PPM"))
        path.write_bytes(bytes(huge).replace(b"1 1", b"90000 90000"))

  return spoil
