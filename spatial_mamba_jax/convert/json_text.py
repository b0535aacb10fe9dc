"""Parses JSON from untrusted files."""

import json
from typing import Any

from spatial_mamba_jax.convert.messages import short


def parse_json(text: bytes) -> Any:
  """Parses JSON strictly.

  Raises:
    ValueError: the text is not JSON, not Unicode or nested too deeply, has two
      values for one key, or has NaN or infinity.
  """
  try:
    return json.loads(
      text, object_pairs_hook=_dictionary, parse_constant=_constant
    )
  except RecursionError as error:
    raise ValueError("it is nested too deeply") from error


def _dictionary(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  dictionary = dict(pairs)
  if len(dictionary) < len(pairs):
    seen = set()
    twice = next(k for k, _ in pairs if k in seen or seen.add(k))
    raise ValueError(f"it has two values for {short(twice)}")
  return dictionary


def _constant(name: str) -> Any:
  raise ValueError(f"{name} is not a number of JSON")
