"""State fusion in plain JAX: one stencil of all dilations.

The taps of several dilations that fall on the same pixel (the centre) are
merged, 27 into 25, and differentiation goes through the merged stencil.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels import stencil
from spatial_mamba_kernels.shapes import state_dtype
from spatial_mamba_kernels.typing import Array, Float

DILATIONS = (1, 3, 5)


def fuse(
  h: Float[Array, "B H W *N D"],
  kernels: Float[Array, "M 3 3 D"],
  alpha: Float[Array, " M"],
  dilations: tuple[int, ...],
) -> Float[Array, "B H W *N D"]:
  """See `state_fusion`; several states a pixel share the channel's stencil."""
  dtype = state_dtype(h, kernels, alpha)
  weighted = alpha.astype(dtype)[:, None, None, None] * kernels.astype(dtype)
  _, height, width, *_ = h.shape
  offsets, weights = _merge_taps(weighted, dilations, height, width)
  return _apply(h, weights, offsets)


def _merge_taps(weighted, dilations, height, width):
  """One weight [T, D] for each distinct offset from the pixel.

  An offset of more than height - 1 rows or width - 1 columns reaches the
  border from every pixel and is as good as that: in small images more taps
  coincide (9 are left of 2 x 2, and 1 of 1 x 1).
  """

  def offset(tap, dilation, size):
    reach = min(dilation, size - 1)
    return (tap - 1) * reach

  taps: dict[tuple[int, int], Array] = {}
  for m, dilation in enumerate(dilations):
    for row in range(3):
      for column in range(3):
        at = offset(row, dilation, height), offset(column, dilation, width)
        weight = weighted[m, row, column]
        taps[at] = taps[at] + weight if at in taps else weight
  return tuple(taps), jnp.stack(list(taps.values()))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _apply(
  h: Float[Array, "B H W *N D"],
  weights: Float[Array, "T D"],
  offsets: tuple[tuple[int, int], ...],
) -> Float[Array, "B H W *N D"]:
  _, height, width, *_ = h.shape
  reach = _reach(offsets)
  y = stencil.correlate(
    _replicate(h, reach),
    weights,
    [(row + reach, column + reach) for row, column in offsets],
    height=height,
    width=width,
  )
  # Else a reduction that follows (a LayerNorm) takes all 25 taps into itself,
  # which on a GPU compiles for minutes.
  return jax.lax.optimization_barrier(y.astype(h.dtype))


def _apply_fwd(h, weights, offsets):
  return _apply(h, weights, offsets), (h, weights)


def _apply_bwd(offsets, residuals, g):
  h, weights = residuals
  _, height, width, *_ = h.shape
  reach = _reach(offsets)
  # The cotangent of the padded image; its border then goes back to the pixels
  # that it was replicated from.
  dpadded = stencil.correlate(
    _zero_pad(g, 2 * reach),
    weights,
    [(reach - row, reach - column) for row, column in offsets],
    height=height + 2 * reach,
    width=width + 2 * reach,
  )
  dh = _fold(_fold(dpadded, reach, axis=1), reach, axis=2)
  dweights = stencil.weight_gradient(
    _replicate(h, reach),
    g.astype(weights.dtype),
    [(row + reach, column + reach) for row, column in offsets],
  )
  return dh.astype(h.dtype), dweights


_apply.defvjp(_apply_fwd, _apply_bwd)


def _reach(offsets):
  return max(max(abs(row), abs(column)) for row, column in offsets)


def _spatial_padding(x, by):
  return [(0, 0), (by, by), (by, by)] + [(0, 0)] * (x.ndim - 3)


def _replicate(x, by):
  return jnp.pad(x, _spatial_padding(x, by), mode="edge")


def _zero_pad(x, by):
  return jnp.pad(x, _spatial_padding(x, by))


def _fold(x: Array, by: int, *, axis: int) -> Array:
  """The transpose of replicating the border `by` times along `axis`."""
  length = x.shape[axis] - 2 * by
  if length == 1:
    return jnp.sum(x, axis, keepdims=True)
  first, inside, last = jnp.split(x, (by + 1, by + length - 1), axis)
  first, last = (jnp.sum(edge, axis, keepdims=True) for edge in (first, last))
  return jnp.concatenate((first, inside, last), axis)
