"""Paths over an image: orders in which a scan visits its tokens.

Axis letters: B batch, H and W height and width, L = H * W tokens, C anything.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from spatial_mamba_kernels.typing import Array, Shaped

# "raster": row by row. "snake": row by row, odd rows from right to left.
# "diagonals": along anti-diagonals, row + column = 0, 1, ...; even ones up, odd
# ones down. "spiral": clockwise inwards from the top left.
Order = Literal["raster", "snake", "diagonals", "spiral"]
Axis = Literal["rows", "columns"]


@dataclasses.dataclass(frozen=True)
class Path:
  """An order of an image's tokens.

  Attributes:
    order: the order in which the image is visited.
    transpose: whether columns take the place of rows in `order`.
    mirror: the axis along which the image is mirrored first, if any.
    reverse: whether the path runs from its end to its beginning.
  """

  order: Order = "raster"
  transpose: bool = False
  mirror: Axis | None = None
  reverse: bool = False

  def tokens(self, image: Shaped[Array, "B H W *C"]) -> Shaped[Array, "B L *C"]:
    """Returns the tokens of an image in the order of the path."""
    return self._tokens(image, jnp)

  def _tokens(self, image, xp):
    """Computes `tokens` by `xp`, NumPy or `jax.numpy`."""
    x = self._mirrored(image, xp)
    if self.transpose:
      x = xp.swapaxes(x, 1, 2)
    batch, height, width, *rest = x.shape
    if self.order == "snake":
      x = _with_odd_rows_mirrored(x, xp)
    x = x.reshape(batch, height * width, *rest)
    if (visited := _visited(self.order, height, width)) is not None:
      x = x[:, visited]
    return xp.flip(x, 1) if self.reverse else x

  def image(
    self, tokens: Shaped[Array, "B L *C"], height: int, width: int
  ) -> Shaped[Array, "B H W *C"]:
    """Returns the image whose tokens these are."""
    x = jnp.flip(tokens, 1) if self.reverse else tokens
    if self.transpose:
      height, width = width, height
    if (visited := _visited(self.order, height, width)) is not None:
      x = x[:, np.argsort(visited)]
    batch, _, *rest = x.shape
    x = x.reshape(batch, height, width, *rest)
    if self.order == "snake":
      x = _with_odd_rows_mirrored(x, jnp)
    if self.transpose:
      x = jnp.swapaxes(x, 1, 2)
    return self._mirrored(x, jnp)

  def steps(self, height: int, width: int) -> np.ndarray:
    """Returns the raster index of the token of each step, [L]."""
    # In NumPy, because the default device may be one to compile for only.
    raster = np.arange(height * width).reshape(1, height, width)
    return self._tokens(raster, np)[0]

  def reversed(self) -> "Path":
    """Returns the path from its end to its beginning."""
    return dataclasses.replace(self, reverse=not self.reverse)

  def _mirrored(self, x, xp):
    if self.mirror is None:
      return x
    return xp.flip(x, 1 if self.mirror == "rows" else 2)


RASTER = Path()
REVERSED_RASTER = RASTER.reversed()
COLUMNS = Path(transpose=True)
ROW_SNAKE = Path("snake")
COLUMN_SNAKE = Path("snake", transpose=True)


def _with_odd_rows_mirrored(x, xp):
  is_odd = np.arange(x.shape[1]) % 2 == 1
  is_odd = is_odd.reshape(1, -1, *(1,) * (x.ndim - 2))
  return xp.where(is_odd, xp.flip(x, 2), x)


def _visited(order: Order, height: int, width: int) -> np.ndarray | None:
  """Returns the raster index of each step; None if no gather is needed."""
  if order == "diagonals":
    return _diagonals(height, width)
  if order == "spiral":
    return _spiral(height, width)
  return None


def _diagonals(height, width):
  row, column = np.divmod(np.arange(height * width), width)
  diagonal = row + column
  # The last key counts first.
  return np.lexsort((np.where(diagonal % 2 == 1, row, -row), diagonal))


def _spiral(height, width):
  left = np.arange(height * width).reshape(height, width)
  visited = []
  while left.size:
    visited.append(left[0])
    # Turned against the clock, the next side is the first row.
    left = np.rot90(left[1:])
  return np.concatenate(visited)
