"""State fusion in plain JAX; see `stencil` for its two forms.

The shifted products are one stencil for all dilations. Taps on the same pixel
(the centre) are merged, 27 into 25. The derivative is that of the merged
stencil.
"""

from functools import partial

import jax
import jax.numpy as jnp

from spatial_mamba_kernels import stencil
from spatial_mamba_kernels.dispatch import keep
from spatial_mamba_kernels.shapes import state_dtype
from spatial_mamba_kernels.sharding import check_only_batch_is_split
from spatial_mamba_kernels.taps import merge_weights, stencil_taps
from spatial_mamba_kernels.typing import Array, Float

# Barrier without which XLA pads the image and merges the weights in every tap.
_computed_once = jax.lax.optimization_barrier


def fuse(
  h: Float[Array, "B H W *N D"],
  kernels: Float[Array, "M 3 3 D"],
  alpha: Float[Array, " M"],
  dilations: tuple[int, ...],
) -> Float[Array, "B H W *N D"]:
  """See `state_fusion`; the N states of a channel share its stencil."""
  dtype = state_dtype(h, kernels, alpha)
  weighted = alpha.astype(dtype)[:, None, None, None] * kernels.astype(dtype)
  return _fuse(h, weighted, dilations)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fuse(
  h: Float[Array, "B H W *N D"],
  kernels: Float[Array, "M 3 3 D"],
  dilations: tuple[int, ...],
) -> Float[Array, "B H W *N D"]:
  check_only_batch_is_split(h)
  return jax.lax.platform_dependent(
    h,
    kernels,
    tpu=partial(grouped, dilations=dilations),
    default=partial(_shifted, dilations=dilations),
  )


def _fuse_fwd(h, kernels, dilations):
  return keep(_fuse(h, kernels, dilations)), (h, kernels)


def _fuse_bwd(dilations, residuals, g):
  def grouped_bwd(h, kernels, g):
    return jax.vjp(partial(grouped, dilations=dilations), h, kernels)[1](g)

  return jax.lax.platform_dependent(
    *residuals,
    g,
    tpu=grouped_bwd,
    default=partial(_shifted_bwd, dilations=dilations),
  )


_fuse.defvjp(_fuse_fwd, _fuse_bwd)


def grouped(h: Array, kernels: Array, *, dilations: tuple[int, ...]) -> Array:
  """Fuses by one of XLA's grouped convolutions for each dilation."""
  image = h.reshape(*h.shape[:3], -1)
  states = image.shape[-1] // kernels.shape[-1]
  padded = _replicate(image.astype(kernels.dtype), max(dilations))
  total = jnp.zeros((), kernels.dtype)
  for kernel, dilation in zip(kernels, dilations, strict=True):
    added = dilation - max(dilations), dilation - max(dilations)
    total += stencil.grouped_convolution(
      padded,
      jnp.tile(kernel, states),
      dilation=dilation,
      padding=(added, added),
    )
  return total.reshape(h.shape).astype(h.dtype)


def _shifted(h, kernels, *, dilations):
  _, height, width, *_ = h.shape
  taps = stencil_taps(dilations, height, width)
  reach = _reach(taps)
  padded, weights = _computed_once(
    (_replicate(h, reach), merge_weights(kernels, taps))
  )
  y = stencil.correlate(
    padded,
    weights,
    [(row + reach, column + reach) for row, column in taps],
    height=height,
    width=width,
  )
  # Without the barrier a reduction that follows (a LayerNorm) is fused with all
  # 25 taps, which takes minutes to compile for a GPU.
  return jax.lax.optimization_barrier(y.astype(h.dtype))


def _shifted_bwd(h, kernels, g, *, dilations):
  _, height, width, *_ = h.shape
  taps = stencil_taps(dilations, height, width)
  reach = _reach(taps)
  weights, unmerge = jax.vjp(partial(merge_weights, taps=taps), kernels)
  # The cotangent of the padded image. `_fold` then adds its border to the
  # pixels that were replicated.
  padded, weights = _computed_once((_zero_pad(g, 2 * reach), weights))
  dpadded = stencil.correlate(
    padded,
    weights,
    [(reach - row, reach - column) for row, column in taps],
    height=height + 2 * reach,
    width=width + 2 * reach,
  )
  dh = _fold(_fold(dpadded, reach, axis=1), reach, axis=2)
  padded, g = _computed_once((_replicate(h, reach), g.astype(weights.dtype)))
  dweights = stencil.weight_gradient(
    padded,
    g,
    [(row + reach, column + reach) for row, column in taps],
  )
  return dh.astype(h.dtype), *unmerge(dweights)


def _reach(taps):
  return max(max(abs(row), abs(column)) for row, column in taps)


def _spatial_padding(x, by):
  return [(0, 0), (by, by), (by, by)] + [(0, 0)] * (x.ndim - 3)


def _replicate(x, by):
  # `jnp.pad` also slices the axes that it does not pad, which JAX cannot do if
  # explicit mesh axes shard them.
  for axis in (1, 2):
    first, last = (
      jax.lax.slice_in_dim(x, start, start + 1, axis=axis)
      for start in (0, x.shape[axis] - 1)
    )
    before, after = (jnp.repeat(edge, by, axis) for edge in (first, last))
    x = jax.lax.concatenate((before, x, after), axis)
  return x


def _zero_pad(x, by):
  return jnp.pad(x, _spatial_padding(x, by))


def _fold(x: Array, by: int, *, axis: int) -> Array:
  """Computes the transpose of `_replicate` along one axis."""
  length = x.shape[axis] - 2 * by
  if length == 1:
    return jnp.sum(x, axis, keepdims=True)
  first, inside, last = jnp.split(x, (by + 1, by + length - 1), axis)
  first, last = (jnp.sum(edge, axis, keepdims=True) for edge in (first, last))
  return jnp.concatenate((first, inside, last), axis)
