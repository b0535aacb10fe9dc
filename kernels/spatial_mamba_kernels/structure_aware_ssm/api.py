"""The structure-aware state space model, the heart of Spatial-Mamba."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Operator
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.shapes import check_shapes
from spatial_mamba_kernels.sharding import is_split_by_rows
from spatial_mamba_kernels.structure_aware_ssm import over_rows, xla
from spatial_mamba_kernels.structure_aware_ssm.plans import DIMENSIONS, KERNELS
from spatial_mamba_kernels.typing import Array


def _xla(arrays, *, implementation):
  return xla.structure_aware_ssm(*arrays, implementation=implementation)


def _last_states(arrays):
  """Returns the shape of what kernels save: the states after each row."""
  u, _, A, *_ = arrays
  batch, height, _, channels = u.shape
  shape = (height, A.shape[1], batch, channels)
  return (jax.ShapeDtypeStruct(shape, jnp.float32),)


operator = Operator(
  "structure_aware_ssm",
  _xla,
  KERNELS,
  DIMENSIONS,
  saves=_last_states,
)


def structure_aware_ssm(
  u: ArrayLike,
  delta: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  C: ArrayLike,
  D: ArrayLike,
  kernels: ArrayLike,
  alpha: ArrayLike,
  *,
  delta_bias: ArrayLike | None = None,
  implementation: str | None = None,
) -> Array:
  """Scans an image's tokens, fuses neighbouring states and observes them.

  Equations 2 to 5 of Spatial-Mamba (arXiv 2410.15091), for each channel:

      h = selective_scan(u, delta, A, B)    # over row-major tokens, N states
      h = state_fusion(h, kernels, alpha)   # each state by the same stencil
      y = sum over n of C[n] * h[n] + D * u

  The authors' code supports only N = 1.

  For forward-mode derivatives see `spatial_mamba_kernels`.

  Args:
    u: [B, H, W, D], the image's tokens.
    delta: [B, H, W, D], the time steps before bias and softplus.
    A: [D, N], negative for a state that decays.
    B: [B, H, W, N], the input projection of each token.
    C: [B, H, W, N], the output projection of each token.
    D: [D], the skip connection.
    kernels: [3, 3, 3, D] (dilation 1, 3 or 5; row; column; channel).
    alpha: [3], the weight of each dilation.
    delta_bias: [D], or None for 0.
    implementation: as for `selective_scan`.

  Returns:
    y, [B, H, W, D] in the dtype of `u`. States are in float32, or float64 for
    float64 inputs.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel cannot serve these arrays or this
      mesh. Lowering a kernel for another platform fails.
  """
  check_implementation(implementation, "structure_aware_ssm")
  if delta_bias is None:
    delta_bias = jnp.zeros(jnp.shape(u)[-1:], jnp.result_type(delta))
  arrays = check_shapes(
    "structure_aware_ssm",
    {
      "u": (u, "B H W D"),
      "delta": (delta, "B H W D"),
      "A": (A, "D N"),
      "B": (B, "B H W N"),
      "C": (C, "B H W N"),
      "D": (D, "D"),
      "kernels": (kernels, "3 3 3 D"),
      "alpha": (alpha, "3"),
      "delta_bias": (delta_bias, "D"),
    },
  )
  if is_split_by_rows():
    return over_rows.structure_aware_ssm(tuple(arrays), implementation)
  return operator(tuple(arrays), implementation)
