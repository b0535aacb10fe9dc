"""What the plans of GPU kernels share: arithmetic on shapes, without Pallas.

Plans are evaluated on every platform, to know whether a GPU kernel can serve.
This module therefore imports nothing that is for a GPU.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.sharding import share_of_device
from spatial_mamba_kernels.taps import Stencil
from spatial_mamba_kernels.typing import Array

# Channels of a program: one for each thread of a warpgroup.
CHANNELS = 128
# Threads of a warp.
LANES = 32
# Programs at most along a dimension of CUDA's grid, here that of images and
# blocks of channels.
MOST_PROGRAMS = 2**16 - 1
# Columns of a strip at most: a thread keeps a sum in registers for each.
MOST_COLUMNS = 32
# Shared memory for barriers, and for aligning rows to 1 KiB.
OTHER_BYTES = 3 * 2**10
# Barriers of one kind in a Pallas kernel at most; each row of a ring has one.
MOST_BARRIERS = 32
# States of a channel at most: a thread keeps a decay, a state and a sum in
# registers for each.
MOST_STATES = 16
# Rows that are summed over channels at once, if shared memory allows.
ROWS_SUMMED = 16


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes that decide the speed, not the result.

  Attributes:
    tokens: tokens in one unrolled piece of code, where their loads and
      exponentials overlap with the waits of a recurrence.
    stages: slots in shared memory for pieces that are loaded ahead.
    programs: programs to launch at least, about as many as a device has
      multiprocessors (132 on an H100 or H200).
  """

  tokens: int = 16
  stages: int = 4
  programs: int = 128


CONFIG = Config()


def check_served(arrays: Sequence[Array]) -> None:
  """Raises NotImplementedError where no GPU kernel can serve these arrays."""
  if importlib.util.find_spec("absl") is None:  # Pallas for GPUs needs it.
    raise NotImplementedError("mosaic_gpu needs absl-py: pip install absl-py")
  for array in arrays:
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      raise NotImplementedError(
        f"mosaic_gpu computes float32 and bfloat16, not {array.dtype}"
      )
  device()


def check_launched(image: Array) -> None:
  """Raises NotImplementedError where there are too many [B, ..., D]."""
  batch, *_, channels = image.shape
  images, channels = share_of_device(batch, channels)
  if images * blocks(channels) > MOST_PROGRAMS:
    raise NotImplementedError(
      f"mosaic_gpu launches {MOST_PROGRAMS} programs for each part of an image"
      f" at most, not for {images} images of {channels} channels on a device"
    )


def check_states(states: int) -> None:
  """Raises NotImplementedError where a channel has too many states."""
  if states > MOST_STATES:
    raise NotImplementedError(
      f"mosaic_gpu keeps up to {MOST_STATES} states a channel in registers,"
      f" not {states}"
    )


def blocks(channels: int) -> int:
  """Returns how many programs share an image's channels."""
  return -(-channels // CHANNELS)


def is_one_piece(shape: tuple[int, ...], sent: tuple[int, ...]) -> bool:
  """Returns whether a copy to an array's last dimensions is contiguous.

  Pallas copies contiguous memory without regard to where dimensions end: what
  is beyond the end of one would overwrite what follows.
  """
  stride, expected = 1, 1
  for size, part in zip(shape[::-1], sent[::-1], strict=False):
    if part != 1 and stride != expected:
      return False
    stride, expected = stride * size, expected * part
  return True


def room(shape: tuple[int, ...], sent: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape that results [..., D] need, so that copies fit.

  Args:
    shape: of the results, the channels as by `pad_channels`.
    sent: shape of a copy, [..., 128].
  """
  *rest, channels = shape
  if is_one_piece(shape, sent):
    channels = blocks(channels) * CHANNELS
  return *rest, channels


def split(size: int, programs: int, *, least: int) -> int:
  """Returns into how many parts to cut `size`, to have programs enough.

  Args:
    size: what is cut.
    programs: how many there are without cutting.
    least: the least size of a part.
  """
  wanted = -(-CONFIG.programs // programs)
  return max(1, min(wanted, size // least))


@dataclasses.dataclass(frozen=True)
class Cut:
  """How an image is cut.

  Attributes:
    height: rows of the image.
    width: columns of the image.
    reach: columns to either side that a column reads.
    strip: columns computed by a program. The last strip ends where the image
      does, and may compute columns that another one computes as well.
    rows: computed by a program; the last one may have fewer.
  """

  height: int
  width: int
  reach: int
  strip: int
  rows: int

  @property
  def strips(self) -> int:
    """How many strips there are."""
    return -(-self.width // self.strip)

  def result(self, image: Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of a result as large as a padded image."""
    shape = room(image.shape, (self.strip, CHANNELS))
    return jax.ShapeDtypeStruct(shape, dtype)

  @property
  def blocks(self) -> int:
    """How many blocks of rows there are."""
    return -(-self.height // self.rows)

  @property
  def read(self) -> int:
    """How many columns a strip reads."""
    return _columns_read(self.width, self.strip, self.reach)


def cut(
  shape: tuple[int, ...],
  reach: int,
  bytes_of: Callable[[int, int], int],
  *,
  columns: int | None = None,
) -> Cut:
  """Returns the cut with the fewest strips that fit into shared memory.

  Args:
    shape: of the images, [B, H, W, D].
    reach: columns to either side that a column reads.
    bytes_of: (columns computed, columns read) -> bytes of shared memory.
    columns: columns of a strip at most; None for `MOST_COLUMNS`.

  Raises:
    NotImplementedError: no strips fit.
  """
  batch, height, width, channels = shape
  most_bytes = device().smem_bytes - OTHER_BYTES
  for strips in range(-(-width // (columns or MOST_COLUMNS)), width + 1):
    strip = -(-width // strips)
    read = _columns_read(width, strip, reach)
    if bytes_of(strip, read) <= most_bytes:
      programs = batch * blocks(channels) * strips
      parts = split(height, programs, least=reach)
      return Cut(height, width, reach, strip, -(-height // parts))
  raise NotImplementedError(
    f"mosaic_gpu keeps rows in shared memory, which do not fit where a pixel"
    f" reads {reach} columns to either side"
  )


def _columns_read(width, strip, reach):
  # Each of two strips is at a border, beyond which nothing is read.
  sides = 1 if strip < width <= 2 * strip else 2
  return min(strip + sides * reach, width)


def ring_rows(reach: int) -> int:
  """Returns how many rows a ring holds, for rows up to `reach` away.

  A TMA needs one more, for the row that is being loaded.
  """
  return 2 * reach + 1 + device().tma


def cut_to_fuse(
  shape: tuple[int, ...], stencil: Stencil, states: Any, image: Any
) -> Cut:
  """Returns the cut for `fuse` and `weights_backward`.

  Args:
    shape: of the images, [B, H, W, D].
    stencil: its taps.
    states: type of the states.
    image: type of the image that is loaded with them.

  Raises:
    NotImplementedError: no cut fits.
  """
  if device().tma and ring_rows(stencil.reach) > MOST_BARRIERS:
    raise NotImplementedError(
      f"mosaic_gpu waits at {MOST_BARRIERS} barriers at most, too few where a"
      f" pixel reads {stencil.reach} rows to either side"
    )
  other = CHANNELS * jnp.dtype(image).itemsize
  sums = CHANNELS * ROWS_SUMMED * 4

  def bytes_of(strip, read):
    ring = ring_rows(stencil.reach) * read
    ring *= CHANNELS * jnp.dtype(states).itemsize
    # Rows of the image; and a row of the result, or products.
    return ring + ring_rows(0) * strip * other + max(strip * other, sums)

  return cut(shape, stencil.reach, bytes_of)


def cut_to_states(
  shape: tuple[int, ...], stencil: Stencil, states: Any, g: Any
) -> Cut:
  """Returns the cut for `states_backward`.

  Args:
    shape: of the images, [B, H, W, D].
    stencil: its taps.
    states: type of the states.
    g: type of the cotangents.

  Raises:
    NotImplementedError: no cut fits.
  """
  loaded, stored = (jnp.dtype(x).itemsize for x in (g, states))

  def bytes_of(strip, read):
    ring = stencil.window * (read + 2 * len(stencil.distances)) * 4
    rows = ring + ring_rows(0) * read * loaded + strip * stored
    return rows * CHANNELS

  return cut(shape, stencil.reach, bytes_of)
