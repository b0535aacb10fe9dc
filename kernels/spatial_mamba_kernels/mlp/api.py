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
  """Computes residual + branch_scale * (gelu(x @ w1 + b1) @ w2 + b2).

  The GELU is exact. The GPU kernel (Hopper, in bfloat16, up to 256 channels)
  keeps the hidden units on the chip, and recomputes them in the backward pass.
  Without it the first product is saved, under the name `CHECKPOINT_NAME`.

  Args:
    x: [B, H, W, C].
    w1: [C, F], cast to the dtype of `x`, as are all that follow.
    b1: [F].
    w2: [F, C].
    b2: [C].
    residual: [B, H, W, C].
    branch_scale: [B], a factor of each image's branch, 0 or more; None for 1.
      Where it is 0 the result is the residual, even if the branch is not
      finite. Its cotangent is 0.
    implementation: None (best for the platform), "mosaic_gpu" (a kernel) or
      "xla" (no kernel). "sequential" and "associative" mean "xla" here.

  Returns:
    [B, H, W, C] in the dtype of `x`.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel does not exist, or cannot serve these
      arrays.
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
