"""Which GPU kernels are for."""

from typing import NamedTuple

import jax
from jax.extend.backend import get_default_device


class Device(NamedTuple):
  """What kernels must know of a GPU.

  Attributes:
    tma: whether that copies, or the threads do: there is one, and shared memory
      for all that it brings at a time.
    smem_bytes: of shared memory that a program may have.
    wgmma: whether that multiplies matrices in shared memory.
  """

  tma: bool
  smem_bytes: int
  wgmma: bool = False


# By compute capability.
DEVICES = {
  **dict.fromkeys(("8.0", "8.7"), Device(False, 163 * 2**10)),
  **dict.fromkeys(("8.6", "8.9"), Device(False, 99 * 2**10)),
  "9.0": Device(True, 227 * 2**10, wgmma=True),
  **dict.fromkeys(("10.0", "10.3", "11.0"), Device(True, 227 * 2**10)),
  **dict.fromkeys(("12.0", "12.1"), Device(False, 99 * 2**10)),
}


def is_default() -> bool:
  """Whether JAX's default device is a GPU."""
  return _capability() is not None


def device() -> Device:
  """The GPU that kernels are for: JAX's default device.

  To compile ahead of time, make it the one to compile for; where the default
  device is no GPU, kernels are for a Hopper.

  Raises:
    NotImplementedError: no kernel can run there.
  """
  capability = _capability() or "9.0"
  if capability not in DEVICES:
    raise NotImplementedError(
      f"mosaic_gpu knows NVIDIA's compute capabilities {', '.join(DEVICES)},"
      f" not {capability}"
    )
  if capability.startswith("8.") and jax.__version_info__ < (0, 11, 2):
    raise NotImplementedError(
      f"mosaic_gpu needs JAX 0.11.2 or newer for compute capability"
      f" {capability}, not {jax.__version__}"
    )
  return DEVICES[capability]


def _capability():
  return getattr(get_default_device(), "compute_capability", None)
