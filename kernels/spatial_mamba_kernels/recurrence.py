"""A linear recurrence over tokens in plain JAX, and its derivative."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from spatial_mamba_kernels.dispatch import keep
from spatial_mamba_kernels.typing import Array, Float


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear_recurrence(
  decay: Float[Array, "B L *C"],
  drive: Float[Array, "B L *C"],
  first: Float[Array, "B *C"] | None,
  implementation: str | None,
) -> Float[Array, "B L *C"]:
  """h[t] = decay[t] * h[t - 1] + drive[t] along axis 1; h[-1] is first or 0."""
  return recur(decay, drive, first, implementation, reverse=False)


def _recurrence_fwd(decay, drive, first, implementation):
  h = keep(linear_recurrence(decay, drive, first, implementation))
  return h, (decay, first, h)


def recurrence_backward(implementation, residuals, g):
  """The adjoint is the same recurrence, run from the last token to the first.

  ddrive[t] = decay[t + 1] * ddrive[t + 1] + g[t]
  ddecay[t] = ddrive[t] * h[t - 1]
  dfirst = decay[0] * ddrive[0]
  """
  decay, first, h = residuals
  ddrive = recur(shift(decay, -1), g, None, implementation, reverse=True)
  dfirst = None if first is None else decay[:, 0] * ddrive[:, 0]
  return ddrive * shift(h, 1, first), ddrive, dfirst


linear_recurrence.defvjp(_recurrence_fwd, recurrence_backward)


def recur(
  decay: Array,
  drive: Array,
  first: Array | None,
  implementation: str | None,
  *,
  reverse: bool,
) -> Array:
  """`linear_recurrence` in either direction, without its derivative."""
  loop = partial(_loop, reverse=reverse)
  prefix = partial(_prefix, reverse=reverse)
  if implementation == "sequential":
    return loop(decay, drive, first)
  if implementation == "associative":
    return prefix(decay, drive, first)
  # The prefix is unrolled, so that the number of tokens must be known.
  if is_symbolic_dim(drive.shape[1]):
    return loop(decay, drive, first)
  # Measured on 2 CPU cores the loop is up to 3 times faster; an accelerator
  # would wait for every one of its L steps.
  return jax.lax.platform_dependent(
    decay, drive, first, cpu=loop, default=prefix
  )


def shift(x: Array, by: int, outside: Array | None = None) -> Array:
  """Returns x[t - by] along axis 1, and `outside` or 0 beyond; `by` is +-1."""
  shifted = _pad(x, (by, -by))
  if outside is None:
    return shifted
  return shifted + _at_end(outside, x, reverse=by < 0)


def _at_end(token: Array, like: Array, *, reverse: bool) -> Array:
  """Returns zeros but for the first token, or the last one in reverse."""
  rest = like.shape[1] - 1
  return _pad(token[:, None], (rest, 0) if reverse else (0, rest))


def _pad(x: Array, tokens: tuple[int, int]) -> Array:
  """Pads axis 1 with zeros; negative numbers cut."""
  padding = [(0, 0, 0)] * x.ndim
  padding[1] = (*tokens, 0)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _loop(
  decay: Array, drive: Array, first: Array | None, *, reverse: bool
) -> Array:
  """Computes one token a step, in a buffer that the loop updates in place."""
  length = drive.shape[1]

  def token(x, t):
    return jax.lax.dynamic_slice_in_dim(x, t, 1, axis=1)

  def step(i, carry):
    h, out = carry
    t = length - 1 - i if reverse else i
    h = token(decay, t) * h + token(drive, t)
    return h, jax.lax.dynamic_update_slice_in_dim(out, h, t, axis=1)

  h = jnp.zeros_like(drive[:, :1]) if first is None else first[:, None]
  _, out = jax.lax.fori_loop(0, length, step, (h, jnp.zeros_like(drive)))
  return out


def _prefix(
  decay: Array, drive: Array, first: Array | None, *, reverse: bool
) -> Array:
  """Computes a parallel prefix over (decay, drive), in log2(L) rounds."""
  if first is not None:
    t = -1 if reverse else 0
    drive = drive + _at_end(decay[:, t] * first, drive, reverse=reverse)

  def combine(left, right):
    return left[0] * right[0], right[0] * left[1] + right[1]

  _, h = jax.lax.associative_scan(
    combine, (decay, drive), reverse=reverse, axis=1
  )
  return h
