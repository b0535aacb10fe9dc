import io
import pathlib
from collections.abc import Callable

import pytest
from PIL import Image


@pytest.fixture
def break_image() -> Callable[[pathlib.Path, str], None]:
  """Damages a file in one of several ways."""

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
        small = io.BytesIO()
        Image.new("L", (1, 1)).save(small, "PPM")
        huge = small.getvalue().replace(b"1 1", b"90000 90000")
        path.write_bytes(huge)

  return spoil
