"""What the plans of TPU kernels share: arithmetic on shapes, without Pallas.

Plans are evaluated on every platform, to know whether a TPU kernel can serve.
This module therefore imports nothing that is for a TPU.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from spatial_mamba_kernels.typing import Array

# Lanes of a vector register, along which channels lie.
LANES = 128


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes that decide the speed, not the result.

  Attributes:
    tile: columns in one unrolled piece of code, where their loads and
      exponentials overlap with the waits of a recurrence. Rows of up to this
      many need no loop, and no arithmetic for their borders at run time; more
      would make the backward kernel longer than about 5000 instructions.
    row: tokens of a row if there is no image, as many as there are lanes.
    vmem_bytes: VMEM that a kernel may use, of the 16 MiB of a v5e.
  """

  tile: int = 64
  row: int = LANES
  vmem_bytes: int = 15 * 2**20


CONFIG = Config()


@dataclasses.dataclass(frozen=True)
class Cut:
  """How images and channels are cut into blocks.

  Attributes:
    group: images computed together, along the sublanes.
    block: channels computed together, along the lanes.
  """

  group: int
  block: int


def cut(
  arrays: Sequence[Array],
  batch: int,
  channels: int,
  bytes_of: Callable[[int, int], int],
  *,
  keeps: str,
) -> Cut:
  """Returns the largest cut that fits into VMEM.

  Args:
    arrays: the operator's arguments.
    batch: images.
    channels: channels of an image.
    bytes_of: (group, channels), both padded to registers -> bytes of VMEM.
    keeps: what takes most of the VMEM, for the error message.

  Raises:
    NotImplementedError: no cut fits, or a dtype is not supported.
  """
  for array in arrays:
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      raise NotImplementedError(
        f"mosaic_tpu computes float32 and bfloat16, not {array.dtype}"
      )
  registers = -(-channels // LANES)
  for group in (8, 4, 2, 1):
    group = min(group, batch)
    for blocks in range(1, registers + 1):
      lanes = -(-registers // blocks) * LANES
      # VMEM pads the images to a power of two.
      if bytes_of(1 << (group - 1).bit_length(), lanes) <= CONFIG.vmem_bytes:
        return Cut(group, min(channels, lanes))
  raise NotImplementedError(
    f"mosaic_tpu keeps {keeps} on the chip, which do not fit"
  )


def row_length(length: int) -> int:
  """Returns how many tokens a row has; a divisor of `length` if possible."""
  longest = min(length, CONFIG.row)
  for width in range(longest, longest // 2, -1):
    if length % width == 0:
      return width
  return longest


def image_row_bytes(width: int, group: int, lanes: int, itemsize: int) -> int:
  """Returns the bytes of a row of pixels; bfloat16 is packed in pairs."""
  return width * max(group, 4 // itemsize) * lanes * itemsize


def lane_row_bytes(width: int, group: int) -> int:
  """Returns the bytes of a row with one float32 a pixel."""
  return group * -(-width // LANES) * LANES * 4


def numbers_bytes(count: int, group: int, lanes: int) -> int:
  """Returns the bytes of states or sums, and of as many parameters."""
  return count * (group + 2 * 2) * lanes * 4
