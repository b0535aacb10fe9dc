"""Checks of the public operators' arguments, and rules for dtypes and ranks."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def check_shapes(op: str, arguments: Mapping[str, tuple[ArrayLike, str]]):
  """Checks the shape of every array.

  Args:
    op: the operator's public name, for the message.
    arguments: {name: (array, axes)}. `axes` has a word for each axis: a letter
      is the same size everywhere, an integer is the size itself.

  Returns:
    The arrays as JAX arrays, in the order given.

  Raises:
    ValueError: a rank or a size differs, or an array is empty or not floating
      point.
  """
  sizes: dict[str, int] = {}
  arrays: list[Array] = []
  for name, (value, axes) in arguments.items():
    array = jnp.asarray(value)
    letters = axes.split()
    expected = [
      sizes.setdefault(x, size) if x.isalpha() else int(x)
      for x, size in zip(letters, array.shape, strict=False)
    ]
    if array.ndim != len(letters) or list(array.shape) != expected:
      known = ", ".join(f"{x}={size}" for x, size in sizes.items())
      raise ValueError(
        f"{op}: {name} must have shape [{', '.join(letters)}] with {known};"
        f" got {list(array.shape)}"
      )
    if not array.size:
      raise ValueError(f"{op}: {name} is empty: {list(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(
        f"{op}: {name} must be floating point, not {array.dtype}"
      )
    arrays.append(array)
  return arrays


def state_dtype(*arrays: Array) -> jnp.dtype:
  """Returns the dtype of states and sums: float64 for float64, else float32.

  Half precision would overflow: fusion kernels of ones, as at initialisation,
  amplify a state 27 times.
  """
  with jax.numpy_dtype_promotion("standard"):
    return at_least_float32(jnp.result_type(*arrays))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
  """Returns float64 for float64, else float32, even if promotion is strict."""
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(dtype, jnp.float32)


def with_rank_of(like: ArrayLike, x: ArrayLike) -> Array:
  """Returns `x` with leading axes of size 1, up to the rank of `like`.

  JAX adds these axes by itself, unless `jax_numpy_rank_promotion` forbids it.
  The compiled program is the same.
  """
  return jax.lax.broadcast_to_rank(x, jnp.ndim(like))
