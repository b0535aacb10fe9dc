"""The selective scan, returning every state."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Operator, Passes
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.selective_scan import xla
from spatial_mamba_kernels.selective_scan.plans import DIMENSIONS, KERNELS
from spatial_mamba_kernels.shapes import check_shapes
from spatial_mamba_kernels.typing import Array


def _xla(arrays, *, implementation):
  return xla.states(*arrays, implementation=implementation)


operator = Operator(
  "selective_scan",
  _xla,
  KERNELS,
  DIMENSIONS,
  passes=Passes(xla.saving_states, xla.from_saved_states),
)


def selective_scan(
  u: ArrayLike,
  delta: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  *,
  delta_bias: ArrayLike | None = None,
  implementation: str | None = None,
) -> Array:
  """Scans tokens with a selective state space and returns all of its states.

  Equation 2 of Spatial-Mamba (arXiv 2410.15091), Mamba's discretisation:

      dt = softplus(delta + delta_bias)                           # [B, L, D]
      h[t] = exp(dt[t] * A) * h[t - 1] + dt[t] * B[t] * u[t]      # h[-1] = 0

  For forward-mode derivatives see `spatial_mamba_kernels`.

  Args:
    u: [B, L, D], the tokens.
    delta: [B, L, D], the time steps before bias and softplus.
    A: [D, N], negative for a state that decays.
    B: [B, L, N], the input projection of each token.
    delta_bias: [D], or None for 0.
    implementation: None (best for the platform), "xla" (best without a kernel),
      "sequential" (a loop over tokens), "associative" (a parallel prefix),
      "mosaic_tpu" or "mosaic_gpu" (kernels for TPUs and GPUs, for float32 and
      bfloat16).

  Returns:
    The states h, [B, L, D, N], in float32 (float64 for float64 inputs).

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel cannot serve these arrays or this
      mesh. Lowering a kernel for another platform fails.
  """
  check_implementation(implementation, "selective_scan")
  if delta_bias is None:
    delta_bias = jnp.zeros(jnp.shape(u)[-1:], jnp.result_type(delta))
  arrays = check_shapes(
    "selective_scan",
    {
      "u": (u, "B L D"),
      "delta": (delta, "B L D"),
      "A": (A, "D N"),
      "B": (B, "B L N"),
      "delta_bias": (delta_bias, "D"),
    },
  )
  return jnp.swapaxes(operator(tuple(arrays), implementation), 2, 3)
