"""What the TPU kernels share: layout, cut, blocks, loops over a row.

A kernel takes images as [H, W, G, b, D], with D along the 128 lanes and b = 8
images along the sublanes of a register. A token's step of the scan then fills
whole registers, and a neighbour's state is another register, never a shift
within one. XLA lays out convolutions in the same way: if the batch is a
multiple of 8, the layout costs no copy. Rows of an image are streamed through
VMEM one by one; rings in VMEM keep what later rows need.

In the shapes, Wp is W padded to whole registers of lanes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.tpu import plan
from spatial_mamba_kernels.tpu.plan import LANES, Cut
from spatial_mamba_kernels.typing import Array, Float

# Rows are processed in order; groups of images and blocks of channels are
# independent.
COMPILER_PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel", "arbitrary")
)


def cost(
  arguments: Sequence[Array | jax.ShapeDtypeStruct],
  results: Any,
  *,
  flops: int,
  transcendentals: int,
) -> pl.CostEstimate:
  """Returns a kernel's cost, for XLA's scheduler.

  Args:
    arguments: each is read once; the first has all pixels and channels.
    results: types of arrays, each of which is written once.
    flops: operations a pixel and channel.
    transcendentals: of these, transcendental functions.
  """
  moved = (*arguments, *jax.tree.leaves(results))
  return pl.CostEstimate(
    flops=flops * arguments[0].size,
    transcendentals=transcendentals * arguments[0].size,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
  )


# Maps a step of the grid to a row.
RowOf = Callable[[Any], Any]


def image_spec(width: int, cut: Cut, row_of: RowOf) -> pl.BlockSpec:
  """Returns the block for a row of [H, W, G, b, D]; W may stand for states."""
  return pl.BlockSpec(
    (None, width, None, cut.group, cut.block),
    lambda i, c, step: (row_of(step), 0, i, 0, c),
  )


def state_spec(width: int, states: int, cut: Cut, row_of: RowOf):
  """Returns the block for a row of [H, W, N, G, b, D]."""
  return pl.BlockSpec(
    (None, width, states, None, cut.group, cut.block),
    lambda i, c, step: (row_of(step), 0, 0, i, 0, c),
  )


def token_spec(states: int, cut: Cut, lanes: int, row_of: RowOf):
  """Returns the block for a row of [H, N, G, b, Wp]."""
  return pl.BlockSpec(
    (None, states, None, cut.group, lanes),
    lambda i, c, step: (row_of(step), 0, i, 0, 0),
  )


def partial_token_spec(states: int, cut: Cut, lanes: int, row_of: RowOf):
  """Returns the block for a row of [K, H, N, G, b, Wp], K channel blocks."""
  return pl.BlockSpec(
    (None, None, states, None, cut.group, lanes),
    lambda i, c, step: (c, row_of(step), 0, i, 0, 0),
  )


def parameter_spec(count: int, cut: Cut) -> pl.BlockSpec:
  """Returns the block for parameters [count, D]."""
  return pl.BlockSpec((count, cut.block), lambda i, c, step: (0, c))


def sums_spec(count: int, cut: Cut) -> pl.BlockSpec:
  """Returns the block for sums [G, count, D], written after the last row."""
  return pl.BlockSpec((None, count, cut.block), lambda i, c, step: (i, 0, c))


def split_tokens(
  x: Float[Array, "B L *C"], width: int
) -> Float[Array, "B H W *C"]:
  """Returns sequences in rows of so many tokens, padded with zeros."""
  padding = [(0, 0)] * x.ndim
  padding[1] = (0, -x.shape[1] % width)
  return jnp.pad(x, padding).reshape(x.shape[0], -1, width, *x.shape[2:])


def join_tokens(
  x: Float[Array, "B H W *C"], length: int
) -> Float[Array, "B L *C"]:
  """Inverts `split_tokens`, for so many tokens."""
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def rows_of(
  x: Float[Array, "B H W D"], group: int
) -> Float[Array, "H W G b D"]:
  """Returns images in groups of `group`, the last one padded with zeros."""
  batch, height, width, channels = x.shape
  x = jnp.pad(x, ((0, -batch % group), (0, 0), (0, 0), (0, 0)))
  x = x.transpose(1, 2, 0, 3)
  return x.reshape(height, width, -1, group, channels)


def images_of(
  x: Float[Array, "H W G b D"], batch: int
) -> Float[Array, "B H W D"]:
  """Inverts `rows_of`, for so many images."""
  height, width, _, _, channels = x.shape
  x = x.reshape(height, width, -1, channels)
  return x[:, :, :batch].transpose(2, 0, 1, 3)


def last_state_rows_of(
  x: Float[Array, "H N B D"], group: int
) -> Float[Array, "H N G b D"]:
  """Returns the state after each row, with images in groups as in `rows_of`."""
  height, states, batch, channels = x.shape
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -batch % group), (0, 0)))
  return x.reshape(height, states, -1, group, channels)


def last_states_of(
  x: Float[Array, "H N G b D"], batch: int
) -> Float[Array, "H N B D"]:
  """Inverts `last_state_rows_of`."""
  height, states, _, _, channels = x.shape
  return x.reshape(height, states, -1, channels)[:, :, :batch]


def state_rows_of(
  x: Float[Array, "B H W N D"], group: int
) -> Float[Array, "H W N G b D"]:
  """Returns all states, with images in groups as in `rows_of`."""
  batch, _, width, states, channels = x.shape
  x = rows_of(x.reshape(batch, -1, width * states, channels), group)
  return x.reshape(x.shape[0], width, states, *x.shape[2:])


def states_of(
  x: Float[Array, "H W N G b D"], batch: int
) -> Float[Array, "B H W N D"]:
  """Inverts `state_rows_of`."""
  height, width, states, *rest = x.shape
  x = images_of(x.reshape(height, width * states, *rest), batch)
  return x.reshape(batch, height, width, states, -1)


def lane_rows_of(
  x: Float[Array, "B H W N"], group: int
) -> Float[Array, "H N G b Wp"]:
  """Returns values that have no channels, a row's tokens along the lanes."""
  batch, height, width, states = x.shape
  x = jnp.pad(x, ((0, -batch % group), (0, 0), (0, -width % LANES), (0, 0)))
  x = x.transpose(1, 3, 0, 2)
  return x.reshape(height, states, -1, group, x.shape[-1])


def tokens_of(
  x: Float[Array, "H N G b Wp"], batch: int, width: int
) -> Float[Array, "B H W N"]:
  """Inverts `lane_rows_of`."""
  height, states, _, _, lanes = x.shape
  x = x.reshape(height, states, -1, lanes)
  return x[:, :, :batch, :width].transpose(2, 0, 3, 1)


def for_tiles(
  width: int,
  body: Callable[[Any, int, Any], Any],
  carry: Any,
  *,
  states: int = 1,
  reverse: bool = False,
) -> Any:
  """Calls body(first column, columns, carry) for tiles that cover a row.

  Tiles are as even as possible; the last one has the rest.

  Args:
    width: columns of the row.
    body: returns the next carry.
    carry: the first one.
    states: how often the body repeats its code for a column.
    reverse: from the last tile to the first.

  Returns:
    The last carry.
  """
  count = -(-width // max(plan.CONFIG.tile // states, 1))
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
  """Calls body(n, carry) for each state, without a loop for one state."""
  if states == 1:
    return body(0, carry)
  return jax.lax.fori_loop(0, states, body, carry)


def columns_from(row: Array, first: Any) -> Array:
  """Returns a row of lanes, rotated so that column `first` is first."""
  lanes = row.shape[-1]
  if isinstance(first, int) and first == 0:
    return row
  return pltpu.roll(row, (lanes - first) % lanes, row.ndim - 1)


def for_lanes(channels: int, body: Callable[[Any], None]) -> None:
  """Calls body(slice of the lanes) for each register of channels."""
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
  """Returns the sum; None stands for zero."""
  return term if total is None else total + term


def inside(channels: int, block: int) -> Any:
  """Returns how many lanes of this block hold a channel; None if all do.

  The last block may extend beyond the last channel.
  """
  if channels % block == 0:
    return None
  return channels - pl.program_id(1) * block


def lane_sums(
  products: Sequence[Array],
  first: Any,
  shape: tuple[int, ...],
  lanes: Any,
  inside: Any,
) -> Array:
  """Returns a tile's sums over channels, each in the lane of its token.

  Args:
    products: [b, lanes] for each column.
    first: the first column.
    shape: [b, Wp], of the result.
    lanes: slice of the lanes summed over.
    inside: see `inside`.
  """
  token = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  total = None
  for j, product in enumerate(products):
    if inside is not None:
      channel = jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
      product = jnp.where(lanes.start + channel < inside, product, 0)
    value = jnp.sum(product, axis=1, keepdims=True)
    total = add(total, jnp.where(token == first + j, value, 0))
  assert total is not None
  return total
