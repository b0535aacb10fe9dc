"""State fusion on GPUs: one kernel forward, two backward."""

from functools import partial

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.by_platform import Arrays, Kernel, Passes
from spatial_mamba_kernels.state_fusion.dimensions import SUMS, finish
from spatial_mamba_kernels.state_fusion.gpu_backward import (
  cut_to_states,
  states_backward,
  weights_backward,
)
from spatial_mamba_kernels.state_fusion.gpu_fuse import cut_to_fuse, fuse
from spatial_mamba_kernels.state_fusion.taps import Stencil
from spatial_mamba_kernels.typing import Array


def kernel(dilations: tuple[int, ...]) -> Kernel:
  """Returns the kernel for these dilations."""
  stencil = Stencil(dilations)
  return Kernel(
    partial(plan, stencil=stencil),
    Passes(
      partial(run_forward, stencil=stencil),
      partial(run_backward, stencil=stencil),
    ),
    partial(finish, stencil=stencil),
    SUMS,
  )


def plan(arrays: Arrays, *, stencil: Stencil) -> None:
  """Raises NotImplementedError where the kernels cannot serve."""
  gpu.check_served(arrays)
  gpu.check_launched(arrays[0])
  h, *_ = arrays
  cut_to_fuse(h.shape, stencil, h.dtype, h.dtype)
  cut_to_states(h.shape, stencil, h.dtype, h.dtype)


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
