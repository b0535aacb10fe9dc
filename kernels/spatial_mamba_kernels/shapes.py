"""Shape checks of the public operators, each failing with one clear line."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike


def check_shapes(op: str, arguments: Mapping[str, tuple[ArrayLike, str]]):
  """Holds every array against its axes, given as letters.

  Args:
    op: the operator's public name, for the message.
    arguments: name -> (array, axes); in `axes`, one word an axis, a letter
      stands for the same size everywhere and a number for itself.

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
  """The precision of states and sums: float32, or float64 for float64 inputs.

  Half precision would overflow: fusion kernels of ones, as at initialisation,
  amplify a state 27 times.
  """
  with jax.numpy_dtype_promotion("standard"):
    return at_least_float32(jnp.result_type(*arrays))


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
  """float32, or float64 for float64; also if JAX forbids promotion."""
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(dtype, jnp.float32)


def with_rank_of(like: ArrayLike, numbers: ArrayLike) -> Array:
  """`numbers` with axes of one before their own, of the rank of `like`.

  JAX adds these axes by itself, unless `jax_numpy_rank_promotion` forbids it.
  The program is the same.
  """
  return jax.lax.broadcast_to_rank(numbers, jnp.ndim(like))
