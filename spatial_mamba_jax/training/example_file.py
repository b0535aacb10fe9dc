"""The picture of a run's predictions, `examples.png`."""

import io
import pathlib
from typing import NamedTuple

from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.tasks.base import Meter, PictureMeter
from spatial_mamba_jax.training.digests import regular, write_whole

_NAME = "examples.png"
# Largest file that is shown, and most pixels. A browser decodes all of it.
_MAX_BYTES, _MAX_PIXELS = 2**24, 2**25
# Most letters of a title.
_TITLE_LETTERS = 200


class ExamplePicture(NamedTuple):
  """A picture of predictions.

  Attributes:
    png: the file.
    title: says which weights predicted; empty if the file does not.
  """

  png: bytes
  title: str


def write_examples(workdir: pathlib.Path, meter: Meter, step: int) -> None:
  """Writes a picture of the moving average's predictions, if a task has one.

  Raises:
    OSError: the file cannot be written.
  """
  if isinstance(meter, PictureMeter):
    title = f"Predictions of the moving average after step {step:,}"
    write_whole(workdir / _NAME, meter.picture(title))


def read_examples(workdir: pathlib.Path) -> ExamplePicture | None:
  """Reads the picture; returns None where there is none.

  Raises:
    ValueError: it is not a PNG, or is damaged or too large.
  """
  from PIL import Image  # An extra.

  path = workdir / _NAME
  try:
    if path.stat().st_size > _MAX_BYTES:
      raise ValueError(f"{_NAME} is larger than {_MAX_BYTES >> 20} MB")
    png = regular(path).read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    raise ValueError(f"{_NAME} cannot be read") from error
  try:
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    is_large = image.width * image.height > _MAX_PIXELS
    title = image.info.get("Title", "")
    image.verify()
  except Exception as error:  # Its type depends on the damage.
    raise ValueError(f"{_NAME} is damaged") from error
  if is_large:
    raise ValueError(f"{_NAME} has more than {_MAX_PIXELS:,} pixels")
  return ExamplePicture(png, one_line(title)[:_TITLE_LETTERS])
