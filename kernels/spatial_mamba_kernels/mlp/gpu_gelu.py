"""The exact GELU and its derivative, for GPU kernels."""

import math

import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Polynomial

from spatial_mamba_kernels.typing import Array


def _log_tail(degree=8, largest=5.0):
  """Returns a polynomial for log2 of the normal distribution's tail at -a.

  It interpolates at Chebyshev's points up to the largest a. Beyond, it falls
  fast enough.
  """
  points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
  points = (points + 1) / 2 * largest
  tail = [math.log2(math.erfc(a / math.sqrt(2)) / 2) for a in points]
  domain = [0, largest]
  return Polynomial.fit(points, tail, degree, domain=domain, window=domain).coef


LOG_TAIL = _log_tail()
# Coefficients of d/da (a * tail(a)) / tail(a).
SLOPE = [1, *(math.log(2) * i * c for i, c in enumerate(LOG_TAIL) if i)]


def gelu(x: Array) -> tuple[Array, Array]:
  """Returns the exact GELU, to 5e-7, and its derivative, to 3e-6.

  The GELU is max(x, 0) - |x| * tail(|x|), with the tail of the normal
  distribution: it takes one exponential, and nothing cancels.
  """
  size = jnp.minimum(jnp.abs(x), 16)
  tail = jnp.exp2(_polynomial(LOG_TAIL, size))
  slope = tail * _polynomial(SLOPE, size)
  return (
    jnp.maximum(x, 0) - size * tail,
    jnp.where(x > 0, 1 - slope, slope),
  )


def _polynomial(coefficients, x):
  value = jnp.full_like(x, np.float32(coefficients[-1]))
  for coefficient in coefficients[-2::-1]:
    value = value * x + np.float32(coefficient)
  return value
