"""The selective scan, returning every state."""

from functools import partial
from typing import Literal, overload

import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels.dispatch import Operator, Passes
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.selective_scan import over_rows, xla
from spatial_mamba_kernels.selective_scan.plans import DIMENSIONS, KERNELS
from spatial_mamba_kernels.shapes import check_shapes, state_dtype
from spatial_mamba_kernels.sharding import is_split_by_rows
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


@overload
def selective_scan(
  u: ArrayLike,
  delta: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  *,
  delta_bias: ArrayLike | None = None,
  h0: ArrayLike | None = None,
  return_last: Literal[False] = False,
  implementation: str | None = None,
) -> Array: ...


@overload
def selective_scan(
  u: ArrayLike,
  delta: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  *,
  delta_bias: ArrayLike | None = None,
  h0: ArrayLike | None = None,
  return_last: Literal[True],
  implementation: str | None = None,
) -> tuple[Array, Array]: ...


def selective_scan(
  u: ArrayLike,
  delta: ArrayLike,
  A: ArrayLike,
  B: ArrayLike,
  *,
  delta_bias: ArrayLike | None = None,
  h0: ArrayLike | None = None,
  return_last: bool = False,
  implementation: str | None = None,
) -> Array | tuple[Array, Array]:
  """Scans tokens with a selective state space and returns all of its states.

  Equation 2 of Spatial-Mamba (arXiv 2410.15091), Mamba's discretisation:

      dt = softplus(delta + delta_bias)                           # [B, L, D]
      h[t] = exp(dt[t] * A) * h[t - 1] + dt[t] * B[t] * u[t]      # h[-1] = h0

  For forward-mode derivatives see `spatial_mamba_kernels`.

  Args:
    u: [B, L, D], the tokens.
    delta: [B, L, D], the time steps before bias and softplus.
    A: [D, N], negative for a state that decays.
    B: [B, L, N], the input projection of each token.
    delta_bias: [D], or None for 0.
    h0: [B, D, N], the state before the first token, or None for 0. With the
      last state of the tokens before, the scan goes on where theirs ended.
    return_last: whether to return the last state too.
    implementation: None (best for the platform), "xla" (best without a kernel),
      "sequential" (a loop over tokens), "associative" (a parallel prefix),
      "mosaic_tpu" or "mosaic_gpu" (kernels for TPUs and GPUs, for float32 and
      bfloat16).

  Returns:
    The states h, [B, L, D, N], in float32 (float64 for float64 inputs). With
    `return_last` a pair of them and the state after the last token, [B, D, N].

  Raises:
    ValueError: the shapes are inconsistent, or the implementation is unknown.
    NotImplementedError: the named kernel cannot serve these arrays or this
      mesh. Lowering a kernel for another platform fails.
  """
  check_implementation(implementation, "selective_scan")
  if delta_bias is None:
    delta_bias = jnp.zeros(jnp.shape(u)[-1:], jnp.result_type(delta))
  arguments = {
    "u": (u, "B L D"),
    "delta": (delta, "B L D"),
    "A": (A, "D N"),
    "B": (B, "B L N"),
    "delta_bias": (delta_bias, "D"),
  }
  if h0 is not None:
    arguments["h0"] = (h0, "B D N")
  *arrays, last = check_shapes("selective_scan", arguments)
  if h0 is None:
    arrays.append(last)
    last = _zero_state(*arrays[:4])
  scan = partial(over_rows.scan, operator) if is_split_by_rows() else operator
  h = jnp.swapaxes(scan((*arrays, last), implementation), 2, 3)
  return (h, h[:, -1]) if return_last else h


def _zero_state(u: Array, delta: Array, A: Array, B: Array) -> Array:
  """Returns zeros [B, D, N], split over devices as the tokens are."""
  zeros = jnp.zeros_like(u[:, 0], state_dtype(u, delta, A, B))
  return jnp.broadcast_to(zeros[..., None], (*zeros.shape, A.shape[1]))
