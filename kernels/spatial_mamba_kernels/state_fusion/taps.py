"""The taps of state fusion, row by row, as kernels process them."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from spatial_mamba_kernels.state_fusion import xla
from spatial_mamba_kernels.typing import Array

# A row's taps: (column offset, index of the tap).
RowTaps = list[tuple[int, Any]]
# {row offset: slot of that neighbour in a ring}.
Slots = dict[int, Any]


@dataclasses.dataclass(frozen=True)
class Stencil:
  """The taps of all dilations together, those on the same pixel merged."""

  dilations: tuple[int, ...]

  @functools.cached_property
  def taps(self) -> xla.Taps:
    """{(row, column) offset: indices in the kernels that have it}."""
    return xla.stencil_taps(self.dilations)

  @functools.cached_property
  def by_row(self) -> dict[int, RowTaps]:
    """{row offset: its taps}."""
    by_row: dict[int, RowTaps] = {}
    for place, (row, column) in enumerate(self.taps):
      by_row.setdefault(row, []).append((column, place))
    return by_row

  @property
  def reach(self) -> int:
    """How many rows or columns away the farthest tap is."""
    return max(self.dilations)

  @property
  def window(self) -> int:
    """Rows that a row of fused states needs: the size of a ring."""
    return 2 * self.reach + 1

  @functools.cached_property
  def distances(self) -> list[int]:
    """Positive row offsets."""
    return sorted(row for row in self.by_row if row > 0)

  @property
  def cotangent_rows(self) -> int:
    """Size of a ring of cotangents: see `CotangentRing`."""
    return self.window + 1 + len(self.distances)

  def merge(self, kernels: Array, alpha: Array) -> Array:
    """Returns the weights as the kernels take them, [T, D]."""
    kernels, alpha = kernels.astype(jnp.float32), alpha.astype(jnp.float32)
    return xla.merge_weights(alpha[:, None, None, None] * kernels, self.taps)

  def slots(self, row: Any, height: int, ring: int) -> Slots:
    """Returns the slots of a row's neighbours, replicated at the border.

    Args:
      row: of an image.
      height: of the image.
      ring: rows of a ring, in which row r is in slot r modulo `ring`.
    """
    return {offset: clip(row + offset, height) % ring for offset in self.by_row}


def clip(row: Any, height: int) -> Any:
  """Returns the index of the row or column that is replicated."""
  return jnp.clip(row, 0, height - 1)


def sources(row: Any, offset: int, height: int) -> tuple[Any, Any]:
  """Returns first and end of the rows that read `row`, several at a border."""
  if offset > 0:
    last = row == height - 1
    first = jnp.maximum(jnp.where(last, height - 1 - offset, row - offset), 0)
    return first, jnp.where(last, height, row - offset + 1)
  is_first = row == 0
  first = jnp.where(is_first, 0, row - offset)
  end = jnp.where(is_first, 1 - offset, row - offset + 1)
  return first, jnp.minimum(end, height)


def columns_read(
  taps: RowTaps, size: int
) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
  """Yields each column that `size` columns read, and by which taps.

  Yields:
    (column, [(reading column, index of the tap)]).
  """
  reach = max(abs(column) for column, _ in taps)
  for column in range(-reach, size + reach):
    readers = [
      (column - offset, place)
      for offset, place in taps
      if 0 <= column - offset < size
    ]
    if readers:
      yield column, readers
