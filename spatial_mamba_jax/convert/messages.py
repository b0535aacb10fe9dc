"""Excerpts of untrusted text in messages: short and safe for a terminal."""

from collections.abc import Collection
from typing import Any

from spatial_mamba_jax.errors import one_line

_LENGTH = 100


def short(value: Any) -> str:
  """Returns any value as one line of at most 100 characters."""
  if isinstance(value, int) and abs(value) >= 2**63:
    return "a huge number"
  text = one_line(str(value)[: 2 * _LENGTH])
  return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."


def listed(names: Collection[Any], limit: int = 3) -> str:
  """Returns the first `limit` names, each shortened, separated by commas."""
  first = [short(name) for name, _ in zip(names, range(limit), strict=False)]
  return ", ".join([*first, *["..."] * (len(names) > limit)])
