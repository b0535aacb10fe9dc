"""What TPU kernels' plans are made of: arithmetic on shapes, without Pallas.

A program is asked on every platform whether a TPU kernel could serve, so that
this imports nothing that is for a TPU.
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
    tile: columns computed in one piece of code, so that their loads, their
      exponentials and a recurrence's waits overlap. Rows of up to this many
      need no loop, and their borders no arithmetic while running; more would
      make the backward kernel longer than some 5000 instructions.
    row: tokens in a row where there is no image to say so: as many numbers,
      one a token, as lie along the lanes.
    vmem_bytes: what a kernel may use of the 16 MiB that a v5e gives it.
  """

  tile: int = 64
  row: int = LANES
  vmem_bytes: int = 15 * 2**20


CONFIG = Config()


@dataclasses.dataclass(frozen=True)
class Cut:
  """How the work is cut.

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
  """The largest cut that fits into VMEM.

  Args:
    arrays: what the operator is given.
    batch: images.
    channels: channels of an image.
    bytes_of: (group, channels), each as it fills registers -> bytes of VMEM.
    keeps: what takes the most of them, for the message.

  Raises:
    NotImplementedError: none does, or a type is not for a TPU.
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
      # In VMEM, as many images as a power of two.
      if bytes_of(1 << (group - 1).bit_length(), lanes) <= CONFIG.vmem_bytes:
        return Cut(group, min(channels, lanes))
  raise NotImplementedError(
    f"mosaic_tpu keeps {keeps} on the chip, which do not fit"
  )


def image_row_bytes(width: int, group: int, lanes: int, itemsize: int) -> int:
  """Of a row of pixels; smaller numbers fill registers by pairs of rows."""
  return width * max(group, 4 // itemsize) * lanes * itemsize


def lane_row_bytes(width: int, group: int) -> int:
  """Of a row with one float32 a pixel."""
  return group * -(-width // LANES) * LANES * 4


def numbers_bytes(count: int, group: int, lanes: int) -> int:
  """Of so many states or sums; and as many parameters and their cotangents."""
  return count * (group + 2 * 2) * lanes * 4
