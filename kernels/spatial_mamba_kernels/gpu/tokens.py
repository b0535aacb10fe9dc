"""GPU kernels whose warps have whole tokens: no thread waits for another.

Some threads of a warp have a token's channels in registers. What they sum over
channels they exchange by shuffles; sums over tokens stay in registers until the
end, and only then do the warps of a warpgroup meet.
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
# Numbers loaded together; Mosaic sums no more over warps.
VECTOR = 4


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Those that a warpgroup has at a time.

  Attributes:
    channels: of a token.
    numbers: of a token that a thread has at most, where there are threads
      enough: with more of them fewer threads take part in a sum.
  """

  channels: int
  numbers: int = 8

  @property
  def threads(self) -> int:
    """Those that have a token: a power of two, 32 at most."""
    return min(LANES, pl.next_power_of_2(-(-self.channels // self.numbers)))

  @property
  def count(self) -> int:
    """How many tokens."""
    return WARPS * LANES // self.threads

  @property
  def shape(self) -> tuple[int, int]:
    """Of their numbers."""
    return self.count, self.channels

  @property
  def layout(self) -> Any:
    """Which thread has which numbers."""
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
    """These tokens' numbers."""
    return gpu.load(image.at[own], self.layout).astype(jnp.float32)

  def store(self, image: Any, own: Any, values: Array) -> None:
    """Stores these tokens' numbers."""
    gpu.store(image.at[own], values.astype(image.dtype))

  def parameters(self, ref: Any) -> Array:
    """A vector of channels, for each token."""
    return self._spread(gpu.load(ref, self.layout.reduce(0)), 1)

  def scales(self, ref: Any, own: Any) -> Array:
    """A number of each token, for each of its channels."""
    return self._spread(gpu.load(ref.at[own], self.layout.reduce(1)), 0)

  def means(self, values: Array) -> Array:
    """Of each token, for each of its channels."""
    return self._spread(jnp.sum(values, axis=1) * (1 / self.channels), 0)

  def zeros(self) -> Array:
    """Sums over tokens begin with these."""
    return plgpu.layout_cast(jnp.zeros(self.shape, jnp.float32), self.layout)

  def store_sum(self, values: Array, tile: Any, out: Any) -> None:
    """Sums over these tokens, where several warpgroups have some each.

    Args:
      values: of this warpgroup.
      tile: reference to as many, float32 in shared memory; its own.
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
    """For `plgpu.kernel`, with `sums` over tokens or without."""
    return plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      # Where warps exchange sums over their tokens.
      reduction_scratch_bytes=4 * math.prod(self.shape) if sums else 0,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    )

  def _spread(self, vector, axis):
    values = lax.broadcast_in_dim(vector, self.shape, (axis,))
    return plgpu.layout_cast(values, self.layout)
