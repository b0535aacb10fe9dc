"""How the warpgroups of a GPU program share the columns of an image.

A program takes an image for 128 channels and walks over its rows. In a row each
of its warpgroups has so many columns as registers allow, and scans them at the
same time as the others theirs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import plan
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.typing import Array

REACH = STENCIL.reach
# A warpgroup's columns, for each of which a thread keeps 5 numbers in
# registers: with 4 warpgroups it has 128 of these.
MOST_COLUMNS = 14
MOST_WARPGROUPS = 4
# Of barriers, a few for each warpgroup.
BARRIER_BYTES = 16 * 8
# Arrays in shared memory are so aligned.
ALIGNMENT = 1024
VECTOR_BYTES = gpu.CHANNELS * 4
# Columns whose products wait in shared memory to be summed over channels.
SUMMED = 4


@dataclasses.dataclass(frozen=True)
class Share:
  """How the warpgroups of a program share an image's columns.

  Attributes:
    warpgroups: in a program.
    columns: of each.
    kept: so many of the weights fit into shared memory; threads load the others
      from where they are.
  """

  warpgroups: int
  columns: int
  kept: int

  @property
  def width(self) -> int:
    """Columns of the image."""
    return self.warpgroups * self.columns

  @property
  def sums(self) -> int:
    """Numbers written for a warpgroup's columns, of which the last are void."""
    return -(-self.columns // SUMMED) * SUMMED

  def of_columns(self, sums: Array) -> Array:
    """[..., warpgroups, sums] as [..., W]."""
    return sums[..., : self.columns].reshape(*sums.shape[:-2], self.width)

  def result(self, image: Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of an image that is computed, from one that is read."""
    shape = gpu.room(image.shape, (self.columns, gpu.CHANNELS))
    return jax.ShapeDtypeStruct(shape, dtype)

  def own(self, me: Any) -> Any:
    """Index of a warpgroup's columns."""
    return pl.ds(me * self.columns, self.columns)

  def is_beyond(self, me: Any, j: int) -> Any:
    """Whether column j, from a warpgroup's first, is beyond the image."""
    if 0 <= j < self.columns:
      return False
    if self.warpgroups == 1:
      return True
    return me == (0 if j < 0 else self.warpgroups - 1)

  def read(self, row: Any, me: Any, j: int) -> Any:
    """Column j of a row [W, ...], from a warpgroup's first.

    Beyond the image it is any other column. Three addresses are enough for all
    of a row, because beyond it is not each column that is clipped.
    """
    first = me * self.columns if self.warpgroups > 1 else 0
    if 0 <= j < self.columns:
      return row.at[pl.ds(first, self.columns)][j]
    if j < 0:
      start = jnp.maximum(first - REACH, 0)
      return row.at[pl.ds(start, REACH)][j + REACH]
    start = jnp.minimum(first + self.columns, self.width - REACH)
    return row.at[pl.ds(start, REACH)][j - self.columns]

  def hand_on(
    self, state: Array, left: Any, added: Any, me: Any, *, reverse: bool = False
  ) -> tuple[Array, Array]:
    """Takes a state through all warpgroups, or from the last to the first.

    Args:
      state: before the first one.
      left: what each leaves of a state.
      added: what each adds to it.
      me: one of them.
      reverse: see above.

    Returns:
      The state before that one, and the state after the last one.
    """
    before, order = state, range(self.warpgroups)
    for other in reversed(order) if reverse else order:
      before = jnp.where(me == other, state, before)
      state = left[other] * state + added[other]
    return before, state

  def meet(self, barrier: Any) -> None:
    """Waits for all warpgroups."""
    if self.warpgroups > 1:
      plgpu.barrier_arrive(barrier)
      plgpu.barrier_wait(barrier)


def share(
  shape: tuple[int, ...], bytes_of: Callable[[int, int], list[int]]
) -> Share:
  """For images [B, H, W, D].

  Args:
    shape: of the images.
    bytes_of: (width, warpgroups) -> bytes of each array in shared memory, but
      for the weights.

  Raises:
    NotImplementedError: the rows do not fit into registers and shared memory,
      there are too few images to keep a GPU busy, or no TMA copies rows.
  """
  gpu_device = device()
  if not gpu_device.tma:
    raise NotImplementedError("rows are copied by a TMA")
  batch, _, width, channels = shape
  if batch * gpu.blocks(channels) < plan.CONFIG.programs // 2:
    raise NotImplementedError("too few programs")
  for warpgroups in range(1, MOST_WARPGROUPS + 1):
    columns, rest = divmod(width, warpgroups)
    if rest or columns > MOST_COLUMNS:
      continue
    if warpgroups == 1 or columns >= REACH:
      arrays = [-(-x // ALIGNMENT) for x in bytes_of(width, warpgroups)]
      free = (gpu_device.smem_bytes - BARRIER_BYTES) // ALIGNMENT - sum(arrays)
      if free >= 0:
        kept = min(free * ALIGNMENT // VECTOR_BYTES, len(STENCIL.taps))
        return Share(warpgroups, columns, kept)
  raise NotImplementedError(f"rows of {width} pixels do not fit")


class Weights:
  """The merged weights of 128 channels, of which some are in shared memory.

  Args:
    weights: reference to [T, D].
    kept: reference to [K, 128] for the first ones; nothing is there yet.
    channels: index of the channels.
  """

  def __init__(self, weights: Any, kept: Any, channels: Any):
    self._weights, self._kept, self._channels = weights, kept, channels

  @staticmethod
  def scratch(kept: int) -> dict[str, Any]:
    """Shared memory for them, if there is any."""
    if not kept:
      return {}
    return {"kept": plgpu.SMEM((kept, gpu.CHANNELS), jnp.float32)}

  def load(self) -> None:
    """Fills shared memory, as one warpgroup does for all."""
    if self._kept is not None:
      for place in range(self._kept.shape[0]):
        self._kept[place] = self._weights[place, self._channels]

  def __getitem__(self, place: int) -> Array:
    if self._kept is not None and place < self._kept.shape[0]:
      return self._kept[place]
    return self._weights[place, self._channels]
