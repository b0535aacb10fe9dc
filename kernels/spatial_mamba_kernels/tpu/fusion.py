"""The stencil of state fusion within a TPU kernel.

Rows of states, and in the backward pass of cotangents, are kept in rings: row r
of an image in slot r modulo the size of the ring.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.taps import (
  RowTaps,
  Slots,
  Stencil,
  clip,
  columns_read,
)
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.typing import Array


class Window(NamedTuple):
  """The rows that a stencil reads for one row, and its weights.

  Attributes:
    stencil: its taps.
    ring_ref: [R, W, N, b, D], rows of states or of cotangents.
    slots: where the row at each offset is in the ring.
    weights_ref: [T, D].
  """

  stencil: Stencil
  ring_ref: Any
  slots: Slots
  weights_ref: Any

  def row_ref(self, offset: int) -> Any:
    """Returns a reference to the row at this offset, [W, N, b, D]."""
    return self.ring_ref.at[self.slots[offset]]

  def weights(self, taps: RowTaps, lanes: Any) -> dict[int, Array]:
    """Returns {index of the tap: weights [1, lanes]}."""
    return {t: self.weights_ref[pl.ds(t, 1), lanes] for _, t in taps}


class Tile(NamedTuple):
  """The part of a row that is computed at once.

  Attributes:
    first: its first column.
    size: its columns.
    n: the state.
    lanes: index of the lanes.
  """

  first: Any
  size: int
  n: Any
  lanes: Any


def fuse_tile(window: Window, tile: Tile) -> list[Array]:
  """Returns a tile of fused states, [b, lanes] for each column."""
  fused: list[Any] = [None] * tile.size
  for offset, taps in window.stencil.by_row.items():
    weights = window.weights(taps, tile.lanes)
    for value, readers in _neighbours(window.row_ref(offset), taps, tile):
      for j, t in readers:
        fused[j] = rows.add(fused[j], weights[t] * value)
  return fused


def weights_backward_tile(
  window: Window, tile: Tile, cotangents_ref: Any, sums_ref: Any
) -> list[Array]:
  """Accumulates a tile's part of the cotangents of the weights.

  Args:
    window: the row's states.
    tile: what of the row.
    cotangents_ref: [W, N, b, D], the cotangents of the row's fused states.
    sums_ref: [T or more, b, D], accumulated.

  Returns:
    What `fuse_tile` returns, from the same loads.
  """
  first, size, n, lanes = tile
  dfused = [cotangents_ref[first + j, n, :, lanes] for j in range(size)]
  fused: list[Any] = [None] * size
  for offset, taps in window.stencil.by_row.items():
    weights, dweights = window.weights(taps, lanes), {}
    for value, readers in _neighbours(window.row_ref(offset), taps, tile):
      for j, t in readers:
        fused[j] = rows.add(fused[j], weights[t] * value)
        dweights[t] = rows.add(dweights.get(t), dfused[j] * value)
    for t, total in dweights.items():
      sums_ref[t, :, lanes] += total
  return fused


@dataclasses.dataclass(frozen=True)
class CotangentRing:
  """A ring of cotangents of fused states, with the border rows summed.

  Two kinds of rows follow the ring itself. One row of zeros stands for rows
  outside the image. One sum for each tap distance stands for the fused rows
  that read a replica of the first or last row of states.

  Attributes:
    stencil: its taps.
    ref: [`Stencil.cotangent_rows`, W, N, b, D].
    height: rows of the image.
  """

  stencil: Stencil
  ref: Any
  height: int

  def clear(self) -> None:
    """Writes the row of zeros; once, before the first row."""
    shape = self.ref.shape[1:]
    self.ref[self.stencil.window] = jnp.zeros(shape, self.ref.dtype)

  def add_border_rows(self, row: Any) -> None:
    """Sums the cotangents for `row` if it is the image's first or last."""
    for distance in self.stencil.distances:

      @pl.when(row == 0)
      def _(distance=distance):
        self._add(distance, 0, min(distance, self.height - 1))

      @pl.when((row == self.height - 1) & (row > 0))
      def _(distance=distance):
        first = max(self.height - 1 - distance, 0)
        self._add(distance, first, self.height - 1)

  def _add(self, distance, first, last):
    window, (width, states) = self.stencil.window, self.ref.shape[1:3]

    def tile(column, size, _):
      for j in range(size):
        total = self.ref[first % window, column + j]
        for source in range(first + 1, last + 1):
          total += self.ref[source % window, column + j]
        self.ref[self._border(distance), column + j] = total

    # A whole row of several states would not fit into the registers.
    rows.for_tiles(width, tile, None, states=states)

  def sources(self, row: Any) -> Slots:
    """Returns the slot of the cotangents for each tap that reads `row`."""
    return {offset: self._source(row, offset) for offset in self.stencil.by_row}

  def _source(self, row, offset):
    if self.height == 1:
      return 0
    if not offset:
      return row % self.stencil.window
    at_border = row == (0 if offset < 0 else self.height - 1)
    source = row - offset
    inside = (source >= 0) & (source < self.height)
    zeros = self.stencil.window
    return jnp.where(
      at_border,
      self._border(abs(offset)),
      jnp.where(inside, source % self.stencil.window, zeros),
    )

  def _border(self, distance):
    return self.stencil.window + 1 + self.stencil.distances.index(distance)


def states_backward(window: Window, dh_ref: Any, lanes: Any) -> None:
  """Computes the cotangents of a row of states: the transposed stencil.

  Args:
    window: of a `CotangentRing`, with its `sources`.
    dh_ref: [W, N, b, D], written.
    lanes: index of the lanes.
  """
  width, states, *_ = dh_ref.shape

  # Every pixel within the image, as if nothing were replicated.
  def tile(first, size, _):
    def of_state(n, _):
      _transpose_tile(window, Tile(first, size, n, lanes), dh_ref)

    rows.for_states(states, of_state, None)

  rows.for_tiles(width, tile, None)

  # The replicas of the first and the last column.
  def fold(n, _):
    _fold_borders(window, n, lanes, dh_ref)

  rows.for_states(states, fold, None)


def _transpose_tile(window, tile, dh_ref):
  first, size, n, lanes = tile
  width = dh_ref.shape[0]
  total: list[Any] = [None] * size
  for offset, taps in window.stencil.by_row.items():
    source_ref = window.row_ref(offset)
    weights = window.weights(taps, lanes)
    transposed = [(-column, t) for column, t in taps]
    for column, readers in columns_read(transposed, size):
      value = source_ref[clip(first + column, width), n, :, lanes]
      if not 0 <= column < size:
        inside = (first + column >= 0) & (first + column < width)
        value = jnp.where(inside, value, 0)
      for j, t in readers:
        total[j] = rows.add(total[j], weights[t] * value)
  for j in range(size):
    dh_ref[first + j, n, :, lanes] = total[j]


def _fold_borders(window, n, lanes, dh_ref):
  """Adds to the border columns the cotangents of their replicas."""
  width, _, group, _ = dh_ref.shape
  for offset, taps in window.stencil.by_row.items():
    source_ref = window.row_ref(offset)
    for border, sign in ((0, -1), (width - 1, 1)):
      total = jnp.zeros((group, lanes.size), jnp.float32)
      folded = None
      for distance in range(window.stencil.reach):
        if distance < width:
          total += source_ref[border - sign * distance, n, :, lanes]
        for column, t in taps:
          if column == sign * (distance + 1):
            product = window.weights_ref[pl.ds(t, 1), lanes] * total
            folded = rows.add(folded, product)
      if folded is not None:
        dh_ref[border, n, :, lanes] += folded


def _neighbours(row_ref, taps, tile) -> Iterator[tuple[Array, Any]]:
  """Yields each column that a tile reads of a row, and by which taps.

  Yields:
    (states [b, lanes], [(column within the tile, index of the tap)]).
  """
  for column, readers in columns_read(taps, tile.size):
    index = clip(tile.first + column, row_ref.shape[0])
    yield row_ref[index, tile.n, :, tile.lanes], readers
