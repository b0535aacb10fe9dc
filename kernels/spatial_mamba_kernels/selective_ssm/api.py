"""The selective SSM: a scan whose states are read out at once."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Operator
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.selective_ssm import xla
from spatial_mamba_kernels.selective_ssm.plans import (
  DIMENSIONS,
  KERNELS,
  saved_states,
)
from spatial_mamba_kernels.shapes import check_shapes
from spatial_mamba_kernels.typing import Array


def _xla(arrays, *, implementation):
  return xla.selective_ssm(*arrays, implementation=implementation)


def _states_before_segments(arrays):
  """Returns the shape of what kernels save: the state before each segment."""
  u, _, A, *_ = arrays
  batch, length, channels = u.shape
  states = A.shape[1]
  shape = (saved_states(length), states, batch, channels)
  return (jax.ShapeDtypeStruct(shape, jnp.float32),)


operator = Operator(
  "selective_ssm",
  _xla,
  KERNELS,
  DIMENSIONS,
  saves=_states_before_segments,
)


def selective_ssm(
  u: ArrayLike,
  delta: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  C: ArrayLike,
  D: ArrayLike,
  *,
  delta_bias: ArrayLike | None = None,
  implementation: str | None = None,
) -> Array:
  """Scans tokens with a selective state space, and reads its states out.

  The SSM of Mamba (arXiv 2312.00752), for each channel:

      h = selective_scan(u, delta, A, B)    # N states
      y = sum over n of C[n] * h[n] + D * u

  Kernels keep the states on the chip. In plain JAX those of up to 64 tokens are
  in memory at once. For forward-mode derivatives see `spatial_mamba_kernels`.
  JAX cannot compute a gradient of a gradient through more than one such chunk,
  unless the implementation is "associative".

  Args:
    u: [B, L, D], the tokens.
    delta: [B, L, D], the time steps before bias and softplus.
    A: [D, N], negative for a state that decays.
    B: [B, L, N], the input projection of each token.
    C: [B, L, N], the output projection of each token.
    D: [D], the skip connection.
    delta_bias: [D], or None for 0.
    implementation: as for `selective_scan`.

  Returns:
    y, [B, L, D] in the dtype of `u`. States are in float32, or float64 for
    float64 inputs.

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel cannot serve these arrays or this
      mesh. Lowering a kernel for another platform fails.
  """
  check_implementation(implementation, "selective_ssm")
  if delta_bias is None:
    delta_bias = jnp.zeros(jnp.shape(u)[-1:], jnp.result_type(delta))
  arrays = check_shapes(
    "selective_ssm",
    {
      "u": (u, "B L D"),
      "delta": (delta, "B L D"),
      "A": (A, "D N"),
      "B": (B, "B L N"),
      "C": (C, "B L N"),
      "D": (D, "D"),
      "delta_bias": (delta_bias, "D"),
    },
  )
  return operator(tuple(arrays), implementation)
