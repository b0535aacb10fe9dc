"""Writes and reads preprocessor_config.json, as the Hugging Face hub has it."""

import json
import pathlib
from typing import Any

from spatial_mamba_jax.convert.json_text import parse_json
from spatial_mamba_jax.preprocessing import Preprocessing

PREPROCESSOR = "preprocessor_config.json"
_MAX_BYTES = 2**20  # Maximum size of the file.
_BICUBIC = 3  # Pillow's number of the filter.


def preprocessor_text(preprocessing: Preprocessing) -> str:
  """Returns the content of a preprocessor_config.json."""
  size = preprocessing.image_size
  fields = {
    "do_resize": True,
    "size": {"shortest_edge": preprocessing.short_side},
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": preprocessing.mean,
    "image_std": preprocessing.std,
  }
  return json.dumps(fields, indent=2) + "\n"


def read_preprocessor(path: pathlib.Path) -> Preprocessing:
  """Reads a preprocessor_config.json; without a file, returns the defaults.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file is not JSON, or asks for another preprocessing than
      `Preprocessing` describes.
  """
  if not path.exists():
    return Preprocessing()
  if not path.is_file():
    raise IsADirectoryError(f"{path} is not a file")
  with path.open("rb") as file:
    text = file.read(_MAX_BYTES + 1)
  try:
    if len(text) > _MAX_BYTES:
      raise ValueError(f"it is longer than {_MAX_BYTES:,} bytes")
    return _parse(parse_json(text))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _are_numbers(values: list[Any]) -> bool:
  return all(type(value) in (int, float) for value in values)


def _parse(fields: Any) -> Preprocessing:
  match fields:
    case {
      "size": {"shortest_edge": int(short)},
      "crop_size": {"height": int(height), "width": int(width)},
      "image_mean": [*mean],
      "image_std": [*std],
    } if (
      height == width
      and fields.get("resample", _BICUBIC) == _BICUBIC
      and _are_numbers([*mean, *std])
    ):
      return Preprocessing(
        image_size=height,
        short_side=short,
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
      )
  raise ValueError(
    "it must have a shortest_edge, a square crop_size, numbers as image_mean"
    " and image_std, and no other resample than 3 (bicubic)"
  )
