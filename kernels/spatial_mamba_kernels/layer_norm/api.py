"""Layer normalisation at the start of a residual branch, and with a gate."""

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.drop_path import all_kept
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.layer_norm import plans, xla
from spatial_mamba_kernels.shapes import check_shapes, state_dtype


def _residual(arrays: Arrays, *, implementation: str | None) -> Any:
  del implementation
  return arrays[0], xla.layer_norm(*arrays)


def _gated(arrays: Arrays, *, implementation: str | None) -> Any:
  del implementation
  return xla.gated(*arrays)


residual_operator = Operator(
  "residual_layer_norm",
  _residual,
  plans.KERNELS,
  plans.DIMENSIONS,
  is_chosen_in_tracing=True,
  is_named=False,
)
gated_operator = Operator(
  "gated_layer_norm",
  _gated,
  plans.GATED_KERNELS,
  plans.GATED_DIMENSIONS,
  is_chosen_in_tracing=True,
  is_named=False,
)


def residual_layer_norm(
  x: ArrayLike,
  scale: ArrayLike,
  bias: ArrayLike,
  *,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """Returns x for the skip connection, and x normalised for the branch.

  The operator also returns x so that a GPU adds the cotangents of skip
  connection and normalisation in one pass over memory.

  Args:
    x: [B, H, W, C].
    scale: [C].
    bias: [C].
    implementation: None (best for the platform), "mosaic_gpu" (a kernel) or
      "xla" (no kernel). "sequential" and "associative" mean "xla" here.

  Returns:
    `x`; and each token normalised to mean 0 and variance 1 over its channels
    (1e-5 is added to the variance), times `scale` plus `bias`, in the dtype of
    `x`.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel does not exist, or cannot serve these
      arrays.
  """
  check_implementation(implementation, "residual_layer_norm")
  arrays = check_shapes(
    "residual_layer_norm",
    {"x": (x, "B H W C"), "scale": (scale, "C"), "bias": (bias, "C")},
  )
  return residual_operator(_exact(*arrays), implementation)


def gated_layer_norm(
  x: ArrayLike,
  scale: ArrayLike,
  bias: ArrayLike,
  gate: ArrayLike,
  branch_scale: ArrayLike | None = None,
  *,
  implementation: str | None = None,
) -> Array:
  """Computes layer_norm(x) * silu(gate) * branch_scale.

  Statistics are in float32, or float64 for float64 inputs.

  Args:
    x: [B, H, W, C].
    scale: [C], the scale of the normalisation (see `residual_layer_norm`).
    bias: [C], the bias of the normalisation.
    gate: [B, H, W, C].
    branch_scale: [B], a factor of each image, 0 or more; None for 1. Where it
      is 0 the result is 0, even if the image is not finite. Its cotangent is 0.
    implementation: None (best for the platform), "mosaic_gpu" (a kernel) or
      "xla" (no kernel). "sequential" and "associative" mean "xla" here.

  Returns:
    [B, H, W, C] in the dtype of `x`.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel does not exist, or cannot serve these
      arrays.
  """
  check_implementation(implementation, "gated_layer_norm")
  *arrays, z, scales = check_shapes(
    "gated_layer_norm",
    {
      "x": (x, "B H W C"),
      "scale": (scale, "C"),
      "bias": (bias, "C"),
      "gate": (gate, "B H W C"),
      "branch_scale": (
        all_kept(x) if branch_scale is None else branch_scale,
        "B",
      ),
    },
  )
  z = z.astype(arrays[0].dtype)
  return gated_operator((*_exact(*arrays), z, scales), implementation)


def _exact(x, scale, bias):
  """Casts the parameters to the dtype of the statistics."""
  dtype = state_dtype(x, scale, bias)
  return x, scale.astype(dtype), bias.astype(dtype)
