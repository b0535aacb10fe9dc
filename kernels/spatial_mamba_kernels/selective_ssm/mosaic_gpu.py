"""The selective SSM on GPUs: one kernel forward, and one backward.

With few images and channels each pass has another kernel before it, so that
tokens can be cut into chunks; see `gpu.scan`.
"""

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.selective_ssm.gpu_backward import backward
from spatial_mamba_kernels.selective_ssm.gpu_forward import forward
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns y on one device and what is saved; see `gpu_forward.forward`."""
  return forward(arrays, save=save)


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Returns cotangents on one device; see `gpu_backward.backward`."""
  (before,) = saved
  return backward(arrays, before, g)
