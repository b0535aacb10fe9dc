"""The state fusion of images whose rows a mesh axis splits over devices.

Each device sends its first and last rows to its neighbours, as many as the
largest dilation.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.sharding import (
  BATCH,
  CHANNELS,
  ROWS,
  ROWS_AXIS,
  WHOLE,
  check_divides_rows,
  per_shard,
  split_axes,
)
from spatial_mamba_kernels.typing import Array, Float

_IMAGE = (BATCH, ROWS, WHOLE, CHANNELS)


def fuse(
  operator: Operator,
  arrays: Arrays,
  dilations: Sequence[int],
  implementation: str | None,
) -> Float[Array, "B H W D"]:
  """Applies the operator `state_fusion` to images that are split by rows.

  Raises:
    ValueError: the rows do not divide evenly, or a device has fewer than its
      neighbour needs.
    NotImplementedError: see `split_axes`.
  """
  batch, height, _, channels = arrays[0].shape
  check_divides_rows("state_fusion", height, max(dilations), "rows")
  run = per_shard(
    partial(_fuse_shard, operator, max(dilations), implementation),
    ((_IMAGE, (WHOLE, WHOLE, WHOLE, CHANNELS), (WHOLE,)),),
    _IMAGE,
    split_axes(batch, channels, by_rows=True),
  )
  return run(arrays)


def _fuse_shard(operator, halo, implementation, arrays):
  h, *weights = arrays
  wide = jnp.concatenate([_above(h, halo), h, _below(h, halo)], axis=1)
  return operator((wide, *weights), implementation)[:, halo:-halo]


def _above(h: Array, halo: int) -> Array:
  """Returns the rows above this device's; at the border, its first row."""
  last = jax.lax.axis_size(ROWS_AXIS) - 1
  rows = jax.lax.ppermute(
    h[:, -halo:], ROWS_AXIS, [(i, i + 1) for i in range(last)]
  )
  border = jnp.repeat(h[:, :1], halo, axis=1)
  return jnp.where(jax.lax.axis_index(ROWS_AXIS) == 0, border, rows)


def _below(h: Array, halo: int) -> Array:
  """Returns the rows below this device's; at the border, its last row."""
  last = jax.lax.axis_size(ROWS_AXIS) - 1
  rows = jax.lax.ppermute(
    h[:, :halo], ROWS_AXIS, [(i + 1, i) for i in range(last)]
  )
  border = jnp.repeat(h[:, -1:], halo, axis=1)
  return jnp.where(jax.lax.axis_index(ROWS_AXIS) == last, border, rows)
