"""GPU kernels whose warps have whole tokens, so that no warp waits for another.

A token's channels are in the registers of some threads of a warp, which sum
over channels by shuffles. Sums over tokens stay in registers until the end,
where the warps of a warpgroup exchange them.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.plan import LANES
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.typing import Array

WARPS = 4
# Values that a thread loads at once; Mosaic sums no more over warps.
VECTOR = 4


@dataclasses.dataclass(frozen=True)
class Tokens:
  """A tile: the tokens that a warpgroup has at a time.

  Attributes:
    channels: channels of a token.
    numbers: channels that a thread has at most, if there are threads enough;
      with more, fewer threads take part in a sum.
  """

  channels: int
  numbers: int = 8

  @property
  def threads(self) -> int:
    """Threads that share a token: a power of two, 32 at most."""
    return min(LANES, pl.next_power_of_2(-(-self.channels // self.numbers)))

  @property
  def count(self) -> int:
    """How many tokens there are."""
    return WARPS * LANES // self.threads

  @property
  def shape(self) -> tuple[int, int]:
    """The tile's shape."""
    return self.count, self.channels

  @property
  def layout(self) -> Any:
    """Which thread has which values."""
    vector = math.gcd(self.channels // self.threads, VECTOR)
    tile = self.count, self.threads * vector
    if self.threads == LANES:
      tiling = plgpu.Tiling((tile, (vector,)))
      warps, lanes = (-3,), (-2,)
    else:
      tiling = plgpu.Tiling((tile, (LANES // self.threads, vector)))
      warps, lanes = (-4,), (-2, -3)
    return plgpu.Layout.TILED(
      tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1
    )

  def load(self, image: Any, own: Any) -> Array:
    """Loads a tile of an image, at a slice of tokens."""
    return gpu.load(image.at[own], self.layout).astype(jnp.float32)

  def store(self, image: Any, own: Any, values: Array) -> None:
    """Stores a tile of an image, at a slice of tokens."""
    gpu.store(image.at[own], values.astype(image.dtype))

  def parameters(self, ref: Any) -> Array:
    """Loads a vector of channels, repeated for each token."""
    return self._spread(gpu.load(ref, self.layout.reduce(0)), 1)

  def scales(self, ref: Any, own: Any) -> Array:
    """Loads a value a token, repeated for each channel."""
    return self._spread(gpu.load(ref.at[own], self.layout.reduce(1)), 0)

  def means(self, values: Array) -> Array:
    """Returns the mean of each token, repeated for each channel."""
    return self._spread(jnp.sum(values, axis=1) * (1 / self.channels), 0)

  def zeros(self) -> Array:
    """Returns a tile of zeros, with which sums over tokens begin."""
    return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

  def store_sum(self, values: Array, tile: Any, out: Any) -> None:
    """Stores the sum over the tile's tokens, one warpgroup of several.

    Args:
      values: the warpgroup's tile.
      tile: reference to its own scratch of that shape, float32.
      out: reference to [C], float32 in device memory.
    """
    gpu.store(tile, values)
    gpu.meet()
    gpu.store(out, jnp.sum(gpu.load(tile, self._columns), axis=0))
    gpu.meet()

  @property
  def _columns(self):
    """A layout that gives each warp some channels of all tokens."""
    columns = self.channels // WARPS
    if columns == LANES:
      tile, warps, lanes = (columns,), (-3,), (-2,)
    else:
      tile, warps, lanes = (LANES // columns, columns), (-4,), (-3, -2)
    return plgpu.Layout.TILED(
      plgpu.Tiling((self.shape, tile, (1,))),
      warp_dims=warps,
      lane_dims=lanes,
      vector_dim=-1,
    )

  def compiler_params(self, *, sums: bool) -> Any:
    """Returns parameters for `plgpu.kernel`, with or without `sums`."""
    return plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      # For warps to exchange their sums over tokens.
      reduction_scratch_bytes=4 * math.prod(self.shape) if sums else 0,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    )

  def _spread(self, vector, axis):
    values = lax.broadcast_in_dim(vector, self.shape, (axis,))
    return plgpu.layout_cast(values, self.layout)
