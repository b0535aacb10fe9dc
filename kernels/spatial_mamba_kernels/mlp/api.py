"""A residual branch: a linear layer, GELU, and a linear layer."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.drop_path import all_kept
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.mlp import plans, xla
from spatial_mamba_kernels.shapes import check_shapes


def _xla(arrays: Arrays, *, implementation: str | None) -> Any:
  del implementation
  return xla.mlp(*arrays)


operator = Operator(
  "mlp",
  _xla,
  plans.KERNELS,
  plans.DIMENSIONS,
  is_chosen_in_tracing=True,
  is_named=False,
)


def mlp(
  x: ArrayLike,
  w1: ArrayLike,
  b1: ArrayLike,
  w2: ArrayLike,
  b2: ArrayLike,
  *,
  residual: ArrayLike,
  branch_scale: ArrayLike | None = None,
  implementation: str | None = None,
) -> Array:
  """Residual + branch_scale * (gelu(x @ w1 + b1) @ w2 + b2), the exact GELU.

  On GPUs that have a kernel for it (Hopper, in bfloat16, up to 256 channels)
  the hidden units stay on the chip, and are made again in the backward pass.
  Elsewhere the first product is kept, by the name `CHECKPOINT_NAME`.

  Args:
    x: [B, H, W, C].
    w1: [C, F], cast to the dtype of `x`, like all that follow.
    b1: [F].
    w2: [F, C].
    b2: [C].
    residual: [B, H, W, C], cast to the dtype of `x`.
    branch_scale: [B], 0 or more, what to multiply each image's branch by, if
      anything; where it is 0, the result is the residual, whatever is in the
      branch. Nothing is propagated back to it.
    implementation: None (best for the platform) or "mosaic_gpu"; "sequential"
      and "associative", as elsewhere, are without a kernel.

  Returns:
    [B, H, W, C] in the dtype of `x`.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: there is no such kernel, or it cannot serve.
  """
  check_implementation(implementation, "mlp")
  arrays = check_shapes(
    "mlp",
    {
      "x": (x, "B H W C"),
      "w1": (w1, "C F"),
      "b1": (b1, "F"),
      "w2": (w2, "F C"),
      "b2": (b2, "C"),
      "residual": (residual, "B H W C"),
      "branch_scale": (
        all_kept(x) if branch_scale is None else branch_scale,
        "B",
      ),
    },
  )
  x, *weights, residual, branch_scale = arrays
  arrays = x, *weights, residual.astype(x.dtype), branch_scale
  return operator(arrays, implementation)
