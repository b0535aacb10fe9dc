"""State fusion on GPUs: one kernel forward, two backward."""

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.gpu.fusion import fuse
from spatial_mamba_kernels.gpu.fusion_backward import (
  states_backward,
  weights_backward,
)
from spatial_mamba_kernels.taps import Stencil
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool, stencil: Stencil) -> Arrays:
  """Returns the fused states [B, H, W, D] on one device; saves nothing."""
  del save
  h, *weights = arrays
  return (fuse(h, stencil.merge(*weights), stencil=stencil, dtype=h.dtype),)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Array, *, stencil: Stencil
) -> Arrays:
  """Returns dh [B, H, W, D], and of the merged weights [G, T, D]."""
  del saved
  h, *weights = arrays
  merged = stencil.merge(*weights)
  dh = states_backward(g, merged, stencil=stencil, dtype=h.dtype)
  (dweights,) = weights_backward(h, merged, g, stencil=stencil)
  return dh, dweights
