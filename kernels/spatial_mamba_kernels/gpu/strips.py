"""How GPU kernels walk over an image, in strips of columns, row by row.

A program takes a strip for 128 channels, from the first row to the last, or
some of the rows where a GPU needs more programs. Rows come into rings in shared
memory, row r in place r modulo the size of the ring.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.gpu.plan import Cut, ring_rows
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.taps import clip
from spatial_mamba_kernels.typing import Array

GRID = ("image", "block", "strip", "rows")


@dataclasses.dataclass(frozen=True)
class Program:
  """What this program computes: its place in the grid, and in the image."""

  cut: Cut
  image: Any
  block: Any
  strip: Any
  rows: Any

  @property
  def channels(self) -> Any:
    """Index of its channels."""
    return pl.ds(self.block * gpu.CHANNELS, gpu.CHANNELS)

  @property
  def first_row(self) -> Any:
    """Its first row."""
    return self.rows * self.cut.rows

  @property
  def end_row(self) -> Any:
    """The row after its last one."""
    return jnp.minimum(self.first_row + self.cut.rows, self.cut.height)

  @property
  def column(self) -> Any:
    """Its first column."""
    if self.cut.strips == 1:
      return 0
    last = self.cut.width - self.cut.strip
    return jnp.minimum(self.strip * self.cut.strip, last)

  @property
  def own_column(self) -> Any:
    """The first of its columns that no strip before computes."""
    return self.strip * self.cut.strip

  @property
  def first_read(self) -> Any:
    """The first column that its columns read."""
    if self.cut.read == self.cut.width:
      return 0
    last = self.cut.width - self.cut.read
    return jnp.clip(self.column - self.cut.reach, 0, last)

  def places(self) -> dict[int, Any]:
    """Where columns lie in what is read: counted from its own first column.

    Columns beyond the image lie where the border does.
    """
    strip, reach, first = self.cut.strip, self.cut.reach, self.first_read
    places = {j: self.column - first + j for j in range(strip)}
    for j in (*range(-reach, 0), *range(strip, strip + reach)):
      places[j] = clip(self.column + j, self.cut.width) - first
    return places

  def columns_of(self, row: Any) -> Callable[[int], Any]:
    """References to columns of a row that has been read, from its own first.

    Beyond the image it is some other column.
    """
    places = self.places()
    # The others at distances from one address.
    own = row.at[pl.ds(places[0], self.cut.strip)]

    def column(j):
      return own.at[j] if 0 <= j < self.cut.strip else row.at[places[j]]

    return column

  def is_inside(self, j: int) -> Any:
    """Whether column j, from its own first, is within the image."""
    column = self.column + j
    return (column >= 0) & (column < self.cut.width)

  def is_own(self, j: int) -> Any:
    """Whether no strip before computes its column j."""
    if self.cut.width % self.cut.strip == 0:
      return True
    return self.column + j >= self.own_column

  def rows_of(self, image: Any) -> Any:
    """[H, W, D], the columns that are read, of a reference [B, H, W, D]."""
    return self.numbers_of(image).at[:, :, self.channels]

  def numbers_of(self, image: Any) -> Any:
    """[H, W, N], of a reference [B, H, W, N] to numbers of no channel."""
    return image.at[self.image, :, pl.ds(self.first_read, self.cut.read)]

  def own_rows_of(self, image: Any) -> Any:
    """[H, W, D], its own columns."""
    columns = pl.ds(self.column, self.cut.strip)
    return image.at[self.image, :, columns, self.channels]


def kernel(
  body: Callable[..., None], image: Array, cut: Cut, **options: Any
) -> Callable[..., Any]:
  """A kernel over images, [B, H, W, D], cut like this one.

  Args:
    body: is given the `Program` after all references.
    image: with padded channels.
    cut: see `Cut`.
    **options: see `gpu.threads.kernel`.
  """

  def run(*refs, **scratch):
    body(*refs, Program(cut, *(lax.axis_index(x) for x in GRID)), **scratch)

  grid = (len(image), gpu.blocks(image.shape[-1]), cut.strips, cut.blocks)
  return gpu.kernel(run, grid=grid, grid_names=GRID, **options)


@dataclasses.dataclass(frozen=True)
class Stream:
  """Rows of an image on their way through a ring in shared memory.

  While a row is computed the next one that is needed comes: by the TMA, to a
  place of its own; by the threads, to their registers, and then in place of the
  first row that was needed.

  Attributes:
    image: reference to [H, W, D].
    ring: reference to [S, W, D].
    barriers: one for each place of the ring, or None without a TMA.
    rows: (first row to be computed, the one after the last).
    reach: so many rows before and after a row must be there with it.
  """

  image: Any
  ring: Any
  barriers: Any
  rows: tuple[Any, Any]
  reach: int

  @staticmethod
  def scratch(
    name: str, columns: int, dtype: Any, reach: int
  ) -> dict[str, Any]:
    """The ring, and the barriers."""
    size = ring_rows(reach)
    ring = {name: plgpu.SMEM((size, columns, gpu.CHANNELS), dtype)}
    if not device().tma:
      return ring
    return {**ring, f"{name}_barriers": plgpu.Barrier(num_barriers=size)}

  @property
  def _end(self):
    return jnp.minimum(self.rows[1] + self.reach, self.image.shape[0])

  def start(self) -> None:
    """Brings all that the first row needs, but may not wait for the last."""
    first = jnp.maximum(self.rows[0] - self.reach, 0)
    last = self.rows[0] + self.reach

    @pl.loop(first, jnp.minimum(last + 1, self._end))
    def _(row):
      if self.barriers is None:
        self._put(row, self._load(row))
      else:
        self._fetch(row)

    if self.barriers is not None:

      @pl.loop(first, jnp.minimum(last, self._end))
      def _(row):
        self._wait(row)

  def request(self, row: Any) -> list[Any]:
    """Begins to bring what the row after this one needs, for `receive`."""
    following = row + self.reach + 1
    if self.barriers is None:
      return self._load(jnp.minimum(following, self._end - 1))
    pl.when(following < self._end)(lambda: self._fetch(following))
    return []

  def arrive(self, row: Any) -> None:
    """Waits for the last of the rows that `row` needs."""
    last = row + self.reach
    if self.barriers is not None:
      pl.when(last < self._end)(lambda: self._wait(last))

  def receive(self, row: Any, requested: list[Any]) -> None:
    """Takes what was requested, when `row` has been computed."""
    self._put(row + self.reach + 1, requested)

  def _place(self, row):
    return row % len_of(self.ring)

  def _load(self, row):
    return [self.image[row, j] for j in range(self.ring.shape[1])]

  def _put(self, row, columns):
    place = self.ring.at[self._place(row)]
    for j, column in enumerate(columns):
      place[j] = column

  def _fetch(self, row):
    place = self._place(row)
    plgpu.copy_gmem_to_smem(
      self.image.at[row], self.ring.at[place], self.barriers.at[place]
    )

  def _wait(self, row):
    plgpu.barrier_wait(self.barriers.at[self._place(row)])


def len_of(ring: Any) -> int:
  """How many rows a ring has."""
  return ring.shape[0]


def for_rows(
  rows: tuple[Any, Any],
  streams: Sequence[Stream],
  body: Callable[[Any, Any], Any],
  carry: Any,
) -> Any:
  """Calls body(row, carry) for each row, with what it needs in the rings.

  Returns:
    The last carry.
  """

  def step(row, carry):
    requested = [stream.request(row) for stream in streams]
    for stream in streams:
      stream.arrive(row)
    carry = body(row, carry)
    gpu.commit()
    for stream, columns in zip(streams, requested, strict=True):
      stream.receive(row, columns)
    return carry

  for stream in streams:
    stream.start()
  return lax.fori_loop(*rows, step, carry)


def store(values: Sequence[Array], tile: Any, row: Any) -> None:
  """Writes a row of results.

  Args:
    values: for each column a vector of channels.
    tile: reference to [W, D] in shared memory, from which they are copied while
      the next row is computed, or None without a TMA.
    row: reference to [W, D].
  """
  place = row if tile is None else tile
  gpu.wait_sent(0)
  for j, value in enumerate(values):
    place[j] = value.astype(place.dtype)
  gpu.commit()
  gpu.send(place, row)
