"""A linear recurrence over tokens in plain JAX, and its derivative."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from spatial_mamba_kernels.dispatch import keep
from spatial_mamba_kernels.typing import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear_recurrence(
  decay: Float[Array, "B L *C"],
  drive: Float[Array, "B L *C"],
  implementation: str | None,
) -> Float[Array, "B L *C"]:
  """h[t] = decay[t] * h[t - 1] + drive[t] along axis 1, with h[-1] = 0."""
  return recur(decay, drive, implementation, reverse=False)


def _recurrence_fwd(decay, drive, implementation):
  h = keep(linear_recurrence(decay, drive, implementation))
  return h, (decay, h)


def recurrence_backward(implementation, residuals, g):
  """The adjoint is the same recurrence, run from the last token to the first.

  ddrive[t] = decay[t + 1] * ddrive[t + 1] + g[t]
  ddecay[t] = ddrive[t] * h[t - 1]
  """
  decay, h = residuals
  ddrive = recur(shift(decay, -1), g, implementation, reverse=True)
  return ddrive * shift(h, 1), ddrive


linear_recurrence.defvjp(_recurrence_fwd, recurrence_backward)


def recur(
  decay: Array, drive: Array, implementation: str | None, *, reverse: bool
) -> Array:
  """`linear_recurrence` in either direction, without its derivative."""
  loop = partial(_loop, reverse=reverse)
  prefix = partial(_prefix, reverse=reverse)
  if implementation == "sequential":
    return loop(decay, drive)
  if implementation == "associative":
    return prefix(decay, drive)
  # The prefix is unrolled, so that the number of tokens must be known.
  if is_symbolic_dim(drive.shape[1]):
    return loop(decay, drive)
  # Measured on 2 CPU cores the loop is up to 3 times faster; an accelerator
  # would wait for every one of its L steps.
  return jax.lax.platform_dependent(decay, drive, cpu=loop, default=prefix)


def shift(x: Array, by: int) -> Array:
  """Returns x[t - by] along axis 1, and 0 outside; `by` is 1 or -1."""
  padding = [(0, 0, 0)] * x.ndim
  padding[1] = (by, -by, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _loop(decay: Array, drive: Array, *, reverse: bool) -> Array:
  """Computes one token a step, in a buffer that the loop updates in place."""
  length = drive.shape[1]

  def token(x, t):
    return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)

  def step(i, carry):
    h, out = carry
    t = length - 1 - i if reverse else i
    h = token(decay, t) * h + token(drive, t)
    return h, jax.lax.dynamic_update_slice_in_dim(out, h, t, axis=1)

  first = jnp.zeros_like(drive[:, :1])
  _, out = jax.lax.fori_loop(0, length, step, (first, jnp.zeros_like(drive)))
  return out


def _prefix(decay: Array, drive: Array, *, reverse: bool) -> Array:
  """Computes a parallel prefix over (decay, drive), in log2(L) rounds."""

  def combine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]

  _, h = jax.lax.associative_scan(
    combine, (decay, drive), reverse=reverse, axis=1
  )
  return h
