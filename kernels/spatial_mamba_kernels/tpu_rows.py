"""What the TPU kernels share: layout, tiles of a row, the stencil's rows.

A kernel sees images as [H, W, G, b, D]: channels along the 128 lanes and b = 8
images along the sublanes of a register, so that a token's step of the scan is a
whole register wide, and a neighbour's state is another register and never a
shift within one. XLA lays convolutions out in the same way, so that it comes at
no copy where the batch is a multiple of 8. Rows of an image are streamed
through VMEM one by one; what later rows need stays in rings there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.typing import Array, Float

LANES = 128
SUBLANES = 8


def rows_of(
  x: Float[Array, "B H W D"], group: int
) -> Float[Array, "H W G b D"]:
  """Images in groups of `group`, the last one filled up with zeros."""
  batch, height, width, channels = x.shape
  x = jnp.pad(x, ((0, -batch % group), (0, 0), (0, 0), (0, 0)))
  x = x.transpose(1, 2, 0, 3)
  return x.reshape(height, width, -1, group, channels)


def images_of(
  x: Float[Array, "H W G b D"], batch: int
) -> Float[Array, "B H W D"]:
  """The images again, without what filled the last group up."""
  height, width, _, _, channels = x.shape
  x = x.reshape(height, width, -1, channels)
  return x[:, :, :batch].transpose(2, 0, 1, 3)


def lane_rows_of(
  x: Float[Array, "B H W N"], group: int
) -> Float[Array, "H N G b Wp"]:
  """One number a token: the tokens of a row along the lanes, filled up."""
  batch, height, width, states = x.shape
  x = jnp.pad(x, ((0, -batch % group), (0, 0), (0, -width % LANES), (0, 0)))
  x = x.transpose(1, 3, 0, 2)
  return x.reshape(height, states, -1, group, x.shape[-1])


def tokens_of(
  x: Float[Array, "H N G b Wp"], batch: int, width: int
) -> Float[Array, "B H W N"]:
  """The inverse of `lane_rows_of`."""
  height, states, _, _, lanes = x.shape
  x = x.reshape(height, states, -1, lanes)
  return x[:, :, :batch, :width].transpose(2, 0, 3, 1)


def for_tiles(
  width: int,
  tile: int,
  body: Callable[[Any, int, Any], Any],
  carry: Any,
  *,
  reverse: bool = False,
) -> Any:
  """Calls body(first column, columns, carry) for tiles that cover a row.

  Tiles are as even as can be, so that little is left for the last one.
  """
  count = -(-width // tile)
  tile = -(-width // count)
  whole, rest = divmod(width, tile)

  def last(carry):
    return body(whole * tile, rest, carry) if rest else carry

  def step(i, carry):
    i = whole - 1 - i if reverse else i
    return body(i * tile, tile, carry)

  if reverse:
    carry = last(carry)
  if whole == 1:
    carry = body(0, tile, carry)
  else:
    carry = jax.lax.fori_loop(0, whole, step, carry)
  return carry if reverse else last(carry)


def for_states(states: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
  """Calls body(n, carry) for each state: one state needs no loop."""
  if states == 1:
    return body(0, carry)
  return jax.lax.fori_loop(0, states, body, carry)


def columns_from(row: Array, first: Any) -> Array:
  """Turns a row of lanes so that column `first` comes first."""
  lanes = row.shape[-1]
  if isinstance(first, int) and first == 0:
    return row
  return pltpu.roll(row, (lanes - first) % lanes, row.ndim - 1)


def for_lanes(channels: int, body: Callable[[Any], None]) -> None:
  """Calls body(index of the lanes) for each register's worth of channels."""
  whole, rest = divmod(channels, LANES)
  if whole > 1:

    @pl.loop(0, whole)
    def _(i):
      body(pl.ds(pl.multiple_of(i * LANES, LANES), LANES))

  elif whole:
    body(pl.ds(0, LANES))
  if rest:
    body(pl.ds(whole * LANES, rest))


def add(total: Array | None, term: Array) -> Array:
  """Sums that start from nothing."""
  return term if total is None else total + term


# {row offset: [(column offset, place among the weights)]}
RowTaps = dict[int, list[tuple[int, int]]]


def by_row(taps: Sequence[tuple[int, int]]) -> RowTaps:
  """A stencil's taps, as (row, column) offsets, row by row."""
  rows: RowTaps = {}
  for place, (row, column) in enumerate(taps):
    rows.setdefault(row, []).append((column, place))
  return rows
