"""The stencil of state fusion on rows that a TPU kernel keeps in its memory.

Rows of states, and backward of cotangents, lie in rings: row r of an image in
place r modulo the size of the ring.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.taps import (
  Slots,
  Stencil,
  clip,
  columns_read,
)
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.typing import Array


def fuse_tile(
  stencil: Stencil, ring, slots: Slots, n, lanes, weights, first, size: int
) -> list[Array]:
  """A tile of fused states.

  Args:
    stencil: its taps.
    ring: reference to [window, W, N, b, D], rows of states.
    slots: see `Stencil.slots`.
    n: the state.
    lanes: index of the lanes to be computed.
    weights: reference to [T, D].
    first: the tile's first column.
    size: its columns.

  Returns:
    [b, lanes] for each column.
  """
  fused: list[Any] = [None] * size
  for offset, taps in stencil.by_row.items():
    weight = _load(taps, weights, lanes)
    for value, readers in _neighbours(
      ring.at[slots[offset]], n, lanes, taps, first, size
    ):
      for j, place in readers:
        fused[j] = rows.add(fused[j], weight[place] * value)
  return fused


def weights_backward_tile(
  stencil: Stencil, ring, slots: Slots, cotangents, n, lanes, weights, sums,
  first, size: int,
) -> list[Array]:  # fmt: skip
  """Adds a tile's part to the cotangents of the weights.

  Args:
    stencil: as in `fuse_tile`, like all not named here.
    ring: rows of states.
    slots: where its rows lie.
    cotangents: reference to [W, N, b, D], those of the fused states of the row.
    n: the state.
    lanes: index of the lanes.
    weights: [T, D].
    sums: reference to [T or more, b, D], added to.
    first: the tile's first column.
    size: its columns.

  Returns:
    What `fuse_tile` does, from the same loads.
  """
  cotangent = [cotangents[first + j, n, :, lanes] for j in range(size)]
  fused: list[Any] = [None] * size
  for offset, taps in stencil.by_row.items():
    weight, dweights = _load(taps, weights, lanes), {}
    for value, readers in _neighbours(
      ring.at[slots[offset]], n, lanes, taps, first, size
    ):
      for j, place in readers:
        fused[j] = rows.add(fused[j], weight[place] * value)
        dweights[place] = rows.add(dweights.get(place), cotangent[j] * value)
    for place, total in dweights.items():
      sums[place, :, lanes] += total
  return fused


@dataclasses.dataclass(frozen=True)
class CotangentRing:
  """Rows of cotangents [W, N, b, D] of fused states, as states need them.

  After the ring itself come a row of zeros, for what is outside an image, and
  sums of rows: those of pixels that see the first or last row of an image in
  place of one beyond it, one sum for each distance.
  """

  stencil: Stencil
  ref: Any
  height: int

  def clear(self) -> None:
    """Once, before all else."""
    shape = self.ref.shape[1:]
    self.ref[self.stencil.window] = jnp.zeros(shape, self.ref.dtype)

  def add_border_rows(self, row: Any) -> None:
    """For the first or the last row of an image."""
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

    # A whole row of several states would be more than the registers hold.
    rows.for_tiles(width, tile, None, states=states)

  def sources(self, row: Any) -> Slots:
    """Where the pixels lie that see `row` at each row offset."""
    return {offset: self._source(row, offset) for offset in self.stencil.by_row}

  def _source(self, row, offset):
    if self.height == 1:
      return 0
    if not offset:
      return row % self.stencil.window
    at_border = row == (0 if offset < 0 else self.height - 1)
    source = row - offset
    inside = (source >= 0) & (source < self.height)
    nothing = self.stencil.window
    return jnp.where(
      at_border,
      self._border(abs(offset)),
      jnp.where(inside, source % self.stencil.window, nothing),
    )

  def _border(self, distance):
    return self.stencil.window + 1 + self.stencil.distances.index(distance)


def states_backward(
  stencil: Stencil, dring, sources: Slots, weights, dh, lanes
) -> None:
  """The cotangents of a row of states: the transpose of the stencil.

  Args:
    stencil: its taps.
    dring: the reference of a `CotangentRing`.
    sources: see there.
    weights: reference to [T, D].
    dh: reference to [W, N, b, D], written.
    lanes: index of the lanes to be computed.
  """
  width, states, group, _ = dh.shape

  def tile(first, size, _):
    def of_state(n, _):
      total: list[Any] = [None] * size
      for offset, taps in stencil.by_row.items():
        source = dring.at[sources[offset]]
        weight = _load(taps, weights, lanes)
        transposed = [(-column, place) for column, place in taps]
        for column, readers in columns_read(transposed, size):
          value = source[clip(first + column, width), n, :, lanes]
          if not 0 <= column < size:
            inside = (first + column >= 0) & (first + column < width)
            value = jnp.where(inside, value, 0)
          for j, place in readers:
            total[j] = rows.add(total[j], weight[place] * value)
      for j in range(size):
        dh[first + j, n, :, lanes] = total[j]

    rows.for_states(states, of_state, None)

  rows.for_tiles(width, tile, None)

  def fold(n, _):
    """What replication folds onto the first and the last column."""
    for offset, taps in stencil.by_row.items():
      source = dring.at[sources[offset]]
      for border, sign in ((0, -1), (width - 1, 1)):
        total = jnp.zeros((group, lanes.size), jnp.float32)
        folded = None
        for distance in range(stencil.reach):
          if distance < width:
            total += source[border - sign * distance, n, :, lanes]
          for column, place in taps:
            if column == sign * (distance + 1):
              product = weights[pl.ds(place, 1), lanes] * total
              folded = rows.add(folded, product)
        if folded is not None:
          dh[border, n, :, lanes] += folded

  rows.for_states(states, fold, None)


def _load(taps, weights, lanes):
  """{place: weight} of a row's taps."""
  return {place: weights[pl.ds(place, 1), lanes] for _, place in taps}


def _neighbours(h, n, lanes, taps, first, size) -> Iterator[tuple[Array, Any]]:
  """For each column that a tile's stencil reads in a row: value, and by whom.

  Yields (states [b, lanes], [(place in the tile, place among the weights)]).
  """
  for column, readers in columns_read(taps, size):
    yield h[clip(first + column, h.shape[0]), n, :, lanes], readers
