"""Logits at the size of an image, strip by strip.

Logits of 150 classes at the size of an image take gigabytes. A head's logits
are resized bilinearly to a strip of rows at a time, and reduced there.

Axis letters: B batch, h and w height and width of a head's logits, H and W
those of an image, R rows of a strip, K classes, S strips.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.data.label_maps import IGNORED

# Most logits of an image's strip: 16 MB in float32.
_MOST_LOGITS = 2**22


class Resized(NamedTuple):
  """Logits with the matrices that resize them to the size of an image.

  Attributes:
    logits: of a head.
    rows: the weights of the logits' rows in each row of the image.
    columns: likewise of the columns.
  """

  logits: Float[Array, "B h w K"]
  rows: Float[Array, "B H h"]
  columns: Float[Array, "B W w"]

  @property
  def size(self) -> tuple[int, int]:
    """Height and width of the image."""
    return self.rows.shape[1], self.columns.shape[1]

  def strip(self, rows: Float[Array, "B R h"]) -> Float[Array, "B R W K"]:
    """Returns the logits of some rows of the image."""
    return jnp.einsum(
      "brh,bvw,bhwk->brvk",
      rows,
      self.columns,
      self.logits,
      precision=jax.lax.Precision.HIGHEST,
    )


def map_strips(
  function: Callable[..., Any],
  views: Sequence[Resized],
  *maps: Int[Array, "B H W"],
) -> Any:
  """Calls a function for each strip of rows.

  Args:
    function: (logits of the views, *maps) -> any arrays. The logits are a list
      of [B, R, W, K], and the maps [B, R, W]. In rows that fill up the last
      strip, logits are 0 and labels `IGNORED`.
    views: logits of images of one size.
    *maps: labels of the pixels.

  Returns:
    The arrays of all strips, stacked: [S, ...].
  """
  height, width = views[0].size
  batch, *_, classes = views[0].logits.shape
  rows = min(height, max(1, _MOST_LOGITS // (width * classes)))
  count = -(-height // rows)
  missing = count * rows - height

  def split(x, value):
    pads = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, pads, constant_values=value)
    return jnp.moveaxis(x.reshape(batch, count, rows, *x.shape[2:]), 1, 0)

  def of_strip(strip):
    weights, maps = strip
    logits = [view.strip(x) for view, x in zip(views, weights, strict=True)]
    return function(logits, *maps)

  weights = [split(view.rows, 0) for view in views]
  labels = [split(x, IGNORED) for x in maps]
  # The backward pass recomputes the logits of a strip.
  return jax.lax.map(jax.checkpoint(of_strip), (weights, labels))


def joined(strips: Int[Array, "S B R W"], height: int) -> Int[Array, "B H W"]:
  """Returns the maps of which `map_strips` returned strips."""
  maps = jnp.moveaxis(strips, 0, 1)
  return maps.reshape(len(maps), -1, maps.shape[-1])[:, :height]
