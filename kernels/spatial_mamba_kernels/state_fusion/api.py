"""Structure-aware state fusion."""

import functools

from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Operator
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.shapes import check_shapes
from spatial_mamba_kernels.sharding import is_split_by_rows
from spatial_mamba_kernels.state_fusion import over_rows, plans, xla
from spatial_mamba_kernels.state_fusion.plans import DIMENSIONS
from spatial_mamba_kernels.taps import DILATIONS
from spatial_mamba_kernels.typing import Array


@functools.cache
def operator(dilations: tuple[int, ...]) -> Operator:
  """Returns the fusion of (h, kernels, alpha) by these dilations."""

  def fuse(arrays, *, implementation):
    del implementation  # Without a recurrence XLA has only one form.
    h, kernels, alpha = arrays
    return xla.fuse(h, kernels, alpha, dilations)

  return Operator("state_fusion", fuse, plans.kernels(dilations), DIMENSIONS)


def state_fusion(
  h: ArrayLike,
  kernels: ArrayLike,
  alpha: ArrayLike,
  *,
  dilations: tuple[int, ...] = DILATIONS,
  implementation: str | None = None,
) -> Array:
  """Fuses each state with its neighbours, by dilated depthwise convolutions.

  Equation 4 of Spatial-Mamba (arXiv 2410.15091). With indices outside the
  image clamped to its border (replicate padding):

      y[i, j] = sum over m, r, c in (0, 1, 2) of
        alpha[m] * kernels[m, r, c]
        * h[i + (r - 1) * dilations[m], j + (c - 1) * dilations[m]]

  For forward-mode derivatives see `spatial_mamba_kernels`.

  Args:
    h: [B, H, W, D], the states of a row-major scan.
    kernels: [M, 3, 3, D] (dilation, row, column, channel).
    alpha: [M], the weight of each dilation.
    dilations: M integers, each 1 or more.
    implementation: None (best for the platform), "mosaic_tpu" or "mosaic_gpu"
      (kernels for TPUs and GPUs, for float32 and bfloat16), or "xla" (no
      kernel). "sequential" and "associative" mean "xla" here.

  Returns:
    [B, H, W, D] in the dtype of `h`; sums are in float32, or float64 for
    float64 inputs.

  Raises:
    ValueError: the shapes are inconsistent, a dilation is below 1, or the
      implementation is unknown.
    NotImplementedError: the named kernel cannot serve these arrays or this
      mesh. Lowering a kernel for another platform fails.
  """
  check_implementation(implementation, "state_fusion")
  if min(dilations, default=0) < 1:
    raise ValueError(
      f"state_fusion: dilations must be 1 or more, not {dilations}"
    )
  m = len(dilations)
  h, kernels, alpha = check_shapes(
    "state_fusion",
    {
      "h": (h, "B H W D"),
      "kernels": (kernels, f"{m} 3 3 D"),
      "alpha": (alpha, f"{m}"),
    },
  )
  arrays = (h, kernels, alpha)
  fuse = operator(tuple(dilations))
  if is_split_by_rows():
    return over_rows.fuse(fuse, arrays, dilations, implementation)
  return fuse(arrays, implementation)
