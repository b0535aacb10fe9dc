"""How the warpgroups of a GPU program share the columns of an image.

A program processes an image row by row, for 128 channels. Each of its
warpgroups has as many columns as its registers allow, and all warpgroups scan
their columns of a row at the same time, each from a state of zero. The scan is
linear: a warpgroup's decay and the state it adds then give the state that the
next one starts from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import plan
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.typing import Array

REACH = STENCIL.reach
# Columns of a warpgroup at most. A thread keeps 5 values in registers for each;
# with 4 warpgroups it has 128 registers.
MOST_COLUMNS = 14
MOST_WARPGROUPS = 4
# Shared memory for barriers, of which each warpgroup has a few.
BARRIER_BYTES = 16 * 8
# Alignment of arrays in shared memory, in bytes.
ALIGNMENT = 1024
# Size of a float32 for each channel.
VECTOR_BYTES = gpu.CHANNELS * 4
# Columns whose products are summed over channels at once, in shared memory.
SUMMED = 4


class Scanned(NamedTuple):
  """The arguments that states and their fusion depend on.

  Attributes:
    u: [B, H, W, D].
    delta: [B, H, W, D].
    A: [D].
    B: [B, H, W].
    weights: [T, D], merged.
    bias: [D].
  """

  u: Array
  delta: Array
  A: Array
  B: Array
  weights: Array
  bias: Array

  def operands(self) -> "Scanned":
    """Returns them as the kernels take them, A and bias as [1, D]."""
    return Scanned(
      gpu.pad_channels(self.u),
      gpu.pad_channels(self.delta),
      gpu.parameters(self.A[None]),
      self.B.astype(jnp.float32),
      gpu.parameters(self.weights),
      gpu.parameters(self.bias[None]),
    )


@dataclasses.dataclass(frozen=True)
class Share:
  """How the warpgroups of a program share an image's columns.

  Attributes:
    warpgroups: of a program.
    columns: of a warpgroup.
    kept: how many of the weights fit into shared memory; threads load the
      others from device memory.
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
    """Sums stored for a warpgroup: one a column, then padding."""
    return -(-self.columns // SUMMED) * SUMMED

  def of_columns(self, sums: Array) -> Array:
    """Returns [..., warpgroups, sums] as [..., W], without padding."""
    return sums[..., : self.columns].reshape(*sums.shape[:-2], self.width)

  def result(self, image: Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of a result as large as a padded image."""
    shape = gpu.room(image.shape, (self.columns, gpu.CHANNELS))
    return jax.ShapeDtypeStruct(shape, dtype)

  def meet(self, barrier: Any) -> None:
    """Waits for all warpgroups."""
    if self.warpgroups > 1:
      plgpu.barrier_arrive(barrier)
      plgpu.barrier_wait(barrier)


class Program(NamedTuple):
  """What one warpgroup computes: its indices in the grid, and its columns.

  Attributes:
    cut: how the columns are shared.
    image: index of the image.
    warpgroup: index within the program.
    block: index of the 128 channels.
    channels: slice of the channels.
    own: slice of the warpgroup's columns.
  """

  cut: Share
  image: Any
  warpgroup: Any
  block: Any
  channels: Any
  own: Any

  @classmethod
  def this(cls, cut: Share) -> "Program":
    """Returns the one that runs."""
    image, warpgroup = lax.axis_index("image"), lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    channels = pl.ds(block * gpu.CHANNELS, gpu.CHANNELS)
    own = pl.ds(warpgroup * cut.columns, cut.columns)
    return cls(cut, image, warpgroup, block, channels, own)

  def is_beyond(self, j: int) -> Any:
    """Returns whether its column j is beyond the image."""
    if 0 <= j < self.cut.columns:
      return False
    if self.cut.warpgroups == 1:
      return True
    return self.warpgroup == (0 if j < 0 else self.cut.warpgroups - 1)

  def read(self, row_ref: Any, j: int) -> Any:
    """Returns its column j of a row [W, ...], or any column beyond the image.

    Three addresses are enough for a row: what is clipped to the image is the
    address of the columns to one side, not each column.
    """
    cut = self.cut
    first = self.warpgroup * cut.columns if cut.warpgroups > 1 else 0
    if 0 <= j < cut.columns:
      return row_ref.at[pl.ds(first, cut.columns)][j]
    if j < 0:
      start = jnp.maximum(first - REACH, 0)
      return row_ref.at[pl.ds(start, REACH)][j + REACH]
    start = jnp.minimum(first + cut.columns, cut.width - REACH)
    return row_ref.at[pl.ds(start, REACH)][j - cut.columns]

  def chain(
    self, state: Array, decays: Any, added: Any, *, reverse: bool = False
  ) -> tuple[Array, Array]:
    """Carries a state through the scans of all warpgroups.

    Args:
      state: before the first warpgroup, or after the last one if `reverse`.
      decays: by warpgroup, the factor that remains of a state.
      added: by warpgroup, the state that it scans from zero.
      reverse: from the last warpgroup to the first.

    Returns:
      The state that this warpgroup starts from, and the final one.
    """
    start, order = state, range(self.cut.warpgroups)
    for other in reversed(order) if reverse else order:
      start = jnp.where(self.warpgroup == other, state, start)
      state = decays[other] * state + added[other]
    return start, state


def share(
  shape: tuple[int, ...], bytes_of: Callable[[int, int], list[int]]
) -> Share:
  """Returns how to share the columns of images.

  Args:
    shape: of the images, [B, H, W, D].
    bytes_of: (width, warpgroups) -> bytes of each array in shared memory, but
      for the weights.

  Raises:
    NotImplementedError: a row does not fit into registers and shared memory,
      there are too few images to keep a GPU busy, or the GPU has no TMA.
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
  """The merged weights of 128 channels, the first of them in shared memory.

  Args:
    weights_ref: [T, D], in device memory.
    kept_ref: [K, 128], in shared memory; None without any.
    channels: slice of the channels.
  """

  def __init__(self, weights_ref: Any, kept_ref: Any, channels: Any):
    self._weights_ref, self._kept_ref = weights_ref, kept_ref
    self._channels = channels

  @staticmethod
  def scratch(kept: int) -> Any:
    """Returns the shared memory for K of them, or None."""
    return plgpu.SMEM((kept, gpu.CHANNELS), jnp.float32) if kept else None

  def load(self) -> None:
    """Fills the shared memory; one warpgroup does that for all."""
    if self._kept_ref is not None:
      for tap in range(self._kept_ref.shape[0]):
        self._kept_ref[tap] = self._weights_ref[tap, self._channels]

  def __getitem__(self, tap: int) -> Array:
    if self._kept_ref is not None and tap < self._kept_ref.shape[0]:
      return self._kept_ref[tap]
    return self._weights_ref[tap, self._channels]
