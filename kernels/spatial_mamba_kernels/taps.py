"""The taps of state fusion, row by row, as kernels process them."""

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
# A row's taps: (column offset, index of the tap).
RowTaps = list[tuple[int, Any]]
# {row offset: slot of that neighbour in a ring}.
Slots = dict[int, Any]


def stencil_taps(
  dilations: tuple[int, ...],
  height: Size = None,
  width: Size = None,
) -> Taps:
  """Returns {offset from the pixel: indices [M, 3, 3] of its taps}.

  An offset of more than height - 1 rows or width - 1 columns reaches the border
  from every pixel, and is clipped to that. In small images more taps therefore
  coincide: 9 distinct taps remain for 2 x 2 pixels, and 1 for 1 x 1. A symbolic
  size clips nothing.
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
  """Sums the weights of each distinct offset."""
  # By a product with a mask: sums of slices were a quarter of a training step's
  # operations.
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
    """{(row, column) offset: indices in the kernels that have it}."""
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
    """Returns the weights as the kernels take them, [T, D]."""
    kernels, alpha = kernels.astype(jnp.float32), alpha.astype(jnp.float32)
    return merge_weights(alpha[:, None, None, None] * kernels, self.taps)

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
