"""The GPU that kernels are compiled for."""

from typing import NamedTuple

import jax
from jax.extend.backend import get_default_device


class Device(NamedTuple):
  """What kernels must know of a GPU.

  Attributes:
    tma: whether kernels copy by the TMA: the GPU has one, and enough shared
      memory for prefetched tiles.
    smem_bytes: shared memory of a program at most.
    wgmma: whether the GPU has Hopper's matrix products (`wgmma`).
  """

  tma: bool
  smem_bytes: int
  wgmma: bool = False


# Devices by compute capability.
DEVICES = {
  **dict.fromkeys(("8.0", "8.7"), Device(False, 163 * 2**10)),
  **dict.fromkeys(("8.6", "8.9"), Device(False, 99 * 2**10)),
  "9.0": Device(True, 227 * 2**10, wgmma=True),
  **dict.fromkeys(("10.0", "10.3", "11.0"), Device(True, 227 * 2**10)),
  **dict.fromkeys(("12.0", "12.1"), Device(False, 99 * 2**10)),
}


def is_default() -> bool:
  """Returns whether JAX's default device is a GPU."""
  return _capability() is not None


def device() -> Device:
  """Returns the GPU that kernels are for: JAX's default device.

  To compile ahead of time, make the target the default device. If that is no
  GPU, kernels are for a Hopper.

  Raises:
    NotImplementedError: no kernel can run on that GPU.
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
