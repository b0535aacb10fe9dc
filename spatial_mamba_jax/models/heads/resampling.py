"""Resizing and pooling of feature maps, as a matrix for each axis.

The matrices are what PyTorch's `interpolate` (bilinear, align_corners=False,
no antialiasing) and `adaptive_avg_pool2d` compute.

Axis letters: B batch, H and W height and width, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from spatial_mamba_kernels.shapes import at_least_float32
from spatial_mamba_kernels.typing import Array, Float

# Most matrices to keep. The largest take some MB.
_MATRICES = 64


@functools.lru_cache(_MATRICES)
def bilinear(old: int, new: int) -> np.ndarray:
  """Returns the matrix [new, old] of bilinear interpolation along an axis."""
  # Twice the coordinate, times `new`, in integers: the weights are exact.
  doubled = (2 * np.arange(new) + 1) * old - new
  doubled = doubled.clip(0, 2 * new * (old - 1))
  left, rest = np.divmod(doubled, 2 * new)
  weight = rest / (2 * new)
  matrix = np.zeros((new, old))
  rows = np.arange(new)
  matrix[rows, left] = 1 - weight
  matrix[rows, np.minimum(left + 1, old - 1)] += weight
  return matrix


@functools.lru_cache(_MATRICES)
def adaptive_mean(old: int, new: int) -> np.ndarray:
  """Returns the matrix [new, old] of adaptive average pooling along an axis.

  Bin i is the mean of floor(i * old / new) up to ceil((i + 1) * old / new) - 1.
  Bins overlap where `new` does not divide `old`.
  """
  bins = np.arange(new)[:, None]
  first, end = bins * old // new, -((-(bins + 1) * old) // new)
  cells = np.arange(old)
  inside = (first <= cells) & (cells < end)
  return inside / (end - first)


def resample(
  x: Float[Array, "B H W C"], rows: np.ndarray, columns: np.ndarray
) -> Float[Array, "B Ho Wo C"]:
  """Multiplies a map by a matrix along its rows, and one along its columns.

  Args:
    x: the map.
    rows: [Ho, H].
    columns: [Wo, W].

  Returns:
    The map in the dtype of `x`; it is computed in float32 or float64.
  """
  dtype = at_least_float32(x.dtype)
  y = jnp.einsum(
    "ph,qw,bhwc->bpqc",
    jnp.asarray(rows, dtype),
    jnp.asarray(columns, dtype),
    x.astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  return y.astype(x.dtype)


def resize(
  x: Float[Array, "B H W C"], height: int, width: int
) -> Float[Array, "B height width C"]:
  """Resizes bilinearly, as PyTorch's `interpolate` without aligned corners."""
  if x.shape[1:3] == (height, width):
    return x
  return resample(x, bilinear(x.shape[1], height), bilinear(x.shape[2], width))


def pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B S S C"]:
  """Averages over size x size bins, as PyTorch's `adaptive_avg_pool2d`."""
  rows, columns = (adaptive_mean(n, size) for n in x.shape[1:3])
  return resample(x, rows, columns)
