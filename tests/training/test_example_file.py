"""The picture of a run's predictions."""

import io
import os

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from spatial_mamba_jax.training.example_file import (
  read_examples,
  write_examples,
)


class Blind:
  """A meter without a picture."""

  def add(self, columns): ...

  def result(self, unreadable): ...

  def write(self, directory): ...


class Seeing(Blind):
  def picture(self, title):
    return png_of(title)


def png_of(title, size=(4, 3)):
  info, file = PngInfo(), io.BytesIO()
  info.add_itxt("Title", title)
  Image.new("L", size).save(file, "PNG", pnginfo=info)
  return file.getvalue()


def test_only_a_meter_with_a_picture_writes_it(tmp_path):
  write_examples(tmp_path, Blind(), 3)
  assert not list(tmp_path.iterdir())
  assert read_examples(tmp_path) is None
  for step, text in ((3, "3"), (1200, "1,200")):
    write_examples(tmp_path, Seeing(), step)
    title = f"Predictions of the moving average after step {text}"
    assert read_examples(tmp_path) == (png_of(title), title)
  assert [path.name for path in tmp_path.iterdir()] == ["examples.png"]


def test_a_failure_is_named(tmp_path):
  (tmp_path / "examples.png").mkdir()
  with pytest.raises(OSError, match=r"examples\.png"):
    write_examples(tmp_path, Seeing(), 3)
  assert [path.name for path in tmp_path.iterdir()] == ["examples.png"]


def test_a_title_is_one_short_line(tmp_path):
  path = tmp_path / "examples.png"
  path.write_bytes(png_of("a\n\x1b[31m" + "x" * 1000))
  picture = read_examples(tmp_path)
  assert picture.title == ("a \\x1b[31m" + "x" * 1000)[:200]
  Image.new("L", (1, 1)).save(path)
  assert read_examples(tmp_path).title == ""


def damaged():
  png = bytearray(png_of("x", (50, 50)))
  png[len(png) // 2] ^= 1
  return bytes(png)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is damaged"),
    (b"GIF89a", "is damaged"),
    (png_of("x")[:-20], "is damaged"),
    (damaged(), "is damaged"),
    (png_of("x") + bytes(2**24), "is larger than 16 MB"),
    (png_of("x", (8000, 8000)), "has more than 33,554,432 pixels"),
    (png_of("x", (30000, 30000)), "is damaged"),
  ],
)
def test_another_file_is_refused(tmp_path, content, message):
  (tmp_path / "examples.png").write_bytes(content)
  with pytest.raises(ValueError, match=f"^examples.png {message}$"):
    read_examples(tmp_path)


def test_a_pipe_is_not_read(tmp_path):
  os.mkfifo(tmp_path / "examples.png")
  with pytest.raises(ValueError, match="cannot be read"):
    read_examples(tmp_path)
