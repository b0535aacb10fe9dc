"""The taps of state fusion, and how kernels walk them row by row."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float, Size

# Dilations of Spatial-Mamba's state fusion.
DILATIONS = (1, 3, 5)

# {(row, column) offset: the indices in [M, 3, 3] that have it}
Taps = dict[tuple[int, int], list[tuple[int, int, int]]]
# A row's taps: (column offset, place among the weights).
RowTaps = list[tuple[int, Any]]
# A row offset -> where in a ring that neighbour of a row lies.
Slots = dict[int, Any]


def stencil_taps(
  dilations: tuple[int, ...],
  height: Size = None,
  width: Size = None,
) -> Taps:
  """{offset from the pixel: the places in [M, 3, 3] that have it}.

  In an image of known size, an offset of more than height - 1 rows or width - 1
  columns reaches the border from every pixel and is as good as that: in small
  images more taps coincide (9 are left of 2 x 2, and 1 of 1 x 1). A size that
  is only a symbol is not known.
  """
  taps: Taps = {}
  for m, dilation in enumerate(dilations):
    by_row, by_column = (
      min(dilation, size - 1) if isinstance(size, int) else dilation
      for size in (height, width)
    )
    for row in range(3):
      for column in range(3):
        offset = (row - 1) * by_row, (column - 1) * by_column
        taps.setdefault(offset, []).append((m, row, column))
  return taps


def merge_weights(
  kernels: Float[Array, "M 3 3 D"], taps: Taps
) -> Float[Array, "T D"]:
  """One weight for each distinct offset."""
  # As sums of slices it was a quarter of a training step's operations.
  has = np.zeros((len(taps), *kernels.shape[:3], 1), kernels.dtype)
  for tap, places in enumerate(taps.values()):
    for place in places:
      has[tap][place] = 1
  return jnp.sum(has * with_rank_of(has, kernels), axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Stencil:
  """The taps of all dilations together, those on the same pixel merged."""

  dilations: tuple[int, ...]

  @functools.cached_property
  def taps(self) -> Taps:
    """{(row, column) offset: the places in the kernels that have it}."""
    return stencil_taps(self.dilations)

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
    """The weights as the kernels take them, [T, D]."""
    kernels, alpha = kernels.astype(jnp.float32), alpha.astype(jnp.float32)
    return merge_weights(alpha[:, None, None, None] * kernels, self.taps)

  def slots(self, row: Any, height: int, ring: int) -> Slots:
    """Where the neighbours of a row lie, at the border those replicated.

    Args:
      row: of an image.
      height: of the image.
      ring: rows of a ring, in which row r is in place r modulo `ring`.
    """
    return {offset: clip(row + offset, height) % ring for offset in self.by_row}


def clip(row: Any, height: int) -> Any:
  """Where the border is replicated from."""
  return jnp.clip(row, 0, height - 1)


def sources(row: Any, offset: int, height: int) -> tuple[Any, Any]:
  """The rows that see `row` at `offset`: first and end; several at a border."""
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
  """For each column that `size` columns in a row read: it, and by whom.

  Yields (column, [(place in the row, place among the weights)]).
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
