"""Initialisers that compile few programs.

JAX compiles each random draw and each constant for its shape, which takes half
a minute for a network. Here a draw is the beginning of a longer one, whose size
is a power of 16. Threefry, JAX's generator, makes each number from the key and
the number's index alone, so that the numbers are those of a draw of the shape
itself. Under `jit` a draw has its own shape.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import DTypeLike
from spatial_mamba_kernels.typing import Array

# How many numbers are drawn; more than the last: as many as are needed.
_SIZES = (2**12, 2**16, 2**20, 2**22)


class Streams(nnx.Rngs):
  """Random streams that are faster than Flax's within `jit`."""

  default: nnx.RngStream

  def __init__(self, key: Array | int):
    super().__init__(key)
    self.default = _Stream(key, tag="default")


class _Stream(nnx.RngStream):
  """Gives the keys that Flax's stream gives, but counts them in Python.

  Flax counts in JAX, and has JAX describe the trace so far at each count.
  """

  given = 0

  def __call__(self) -> Array:
    key = jax.random.fold_in(self.key[...], self.given)
    self.given += 1
    return key


def normal(std: float) -> nnx.Initializer:
  """Returns the initialiser of a normal distribution around 0."""
  return drawn(
    lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * std
  )


def uniform(low: float, high: float) -> nnx.Initializer:
  """Returns the initialiser of a uniform distribution over [low, high)."""
  return drawn(
    lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)
  )


def fan_in_uniform(fan_in: int) -> nnx.Initializer:
  """Returns the initialiser of PyTorch's Conv2d and Linear.

  It draws kernels and biases uniformly from +-1/sqrt(fan_in). For kernels this
  is Kaiming's uniform initialisation with a = sqrt(5).
  """
  bound = 1 / math.sqrt(fan_in)
  return uniform(-bound, bound)


def constant(
  value: int, shape: int | tuple[int, ...], dtype: DTypeLike
) -> Array:
  """Returns an array of equal numbers."""
  return jax.device_put(np.full(shape, value, dtype))


def zeros(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
  """Returns zeros, as an initialiser."""
  del key
  return constant(0, shape, dtype)


def drawn(
  sample: Callable[[Array, tuple[int, ...], DTypeLike], Array],
) -> nnx.Initializer:
  """Returns the initialiser that draws independent numbers by `sample`.

  Args:
    sample: (key, shape, dtype) -> the numbers.
  """

  @functools.wraps(sample)
  def init(key, shape, dtype):
    if isinstance(key, Tracer):
      return sample(key, shape, dtype)
    size = math.prod(shape)
    longer = next((x for x in _SIZES if x >= size), size)
    numbers = np.asarray(sample(key, (longer,), dtype))
    return jax.device_put(numbers[:size].reshape(shape))

  return init
