"""Layer normalisation, before a residual branch and within one."""

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
  """Where a residual branch begins: x itself, and x normalised for the branch.

  That the operator returns x, too, lets a GPU add up the cotangents of both in
  one pass over memory, with those of the normalisation.

  Args:
    x: [B, H, W, C].
    scale: [C].
    bias: [C].
    implementation: None (best for the platform) or "mosaic_gpu"; "sequential"
      and "associative", as elsewhere, are without a kernel.

  Returns:
    `x`; and each token with mean 0 and variance 1 over its channels (1e-5 is
    added to the variance), times `scale` plus `bias`, in the dtype of `x`.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: there is no such kernel, or it cannot serve.
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
  """silu(gate) times x normalised, or nothing of images that are dropped.

  Statistics are in float32, or float64 for float64 inputs.

  Args:
    x: [B, H, W, C].
    scale: [C], of the normalisation (see `residual_layer_norm`).
    bias: [C].
    gate: [B, H, W, C].
    branch_scale: [B], 0 or more, what to multiply each image by, if anything;
      where it is 0, the result is, whatever is in the image. Nothing is
      propagated back to it.
    implementation: None (best for the platform) or "mosaic_gpu"; "sequential"
      and "associative", as elsewhere, are without a kernel.

  Returns:
    [B, H, W, C] in the dtype of `x`.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: there is no such kernel, or it cannot serve.
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
  """The parameters in the precision of statistics."""
  dtype = state_dtype(x, scale, bias)
  return x, scale.astype(dtype), bias.astype(dtype)
