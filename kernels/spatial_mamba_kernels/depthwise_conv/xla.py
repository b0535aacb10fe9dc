"""Depthwise convolution in plain JAX; see `stencil` for its two forms."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spatial_mamba_kernels import stencil
from spatial_mamba_kernels.activations import relu, silu
from spatial_mamba_kernels.shapes import state_dtype, with_rank_of
from spatial_mamba_kernels.sharding import check_only_batch_is_split
from spatial_mamba_kernels.typing import Array, Float

# Zeros before the first and after the last row, and the same of the columns.
Padding = tuple[tuple[int, int], tuple[int, int]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(
  x: Float[Array, "B H W D"],
  kernel: Float[Array, "R S D"],
  stride: int,
  padding: Padding | None = None,
) -> Float[Array, "B Ho Wo D"]:
  """See `depthwise_conv`; without a padding the kernel is centred."""
  check_only_batch_is_split(x)
  return jax.lax.platform_dependent(
    x,
    kernel,
    tpu=partial(grouped, stride=stride, padding=padding),
    default=partial(shifted, stride=stride, padding=padding),
  )


def _convolve_fwd(x, kernel, stride, padding):
  return convolve(x, kernel, stride, padding), (x, kernel)


def _convolve_bwd(stride, padding, residuals, g):
  options = {"stride": stride, "padding": padding}

  def grouped_bwd(x, kernel, g):
    return jax.vjp(partial(grouped, **options), x, kernel)[1](g)

  return jax.lax.platform_dependent(
    *residuals, g, tpu=grouped_bwd, default=partial(_shifted_bwd, **options)
  )


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def plain(x: Array, kernel: Array, *, convolve: Callable[..., Array]) -> Array:
  """See `depthwise_conv`, in the dtype of `x`."""
  return convolve(x, kernel).astype(x.dtype)


def residual(
  x: Array, kernel: Array, bias: Array, *, convolve: Callable[..., Array]
) -> Array:
  """See `residual_depthwise_conv`."""
  y = biased(convolve(x, kernel), bias)
  return (x.astype(y.dtype) + y).astype(x.dtype)


def activated(
  x: Array, kernel: Array, bias: Array, *, convolve: Callable[..., Array]
) -> Array:
  """See `silu_depthwise_conv`."""
  return silu(biased(convolve(x, kernel), bias)).astype(x.dtype)


def projected(
  x: Array,
  kernel: Array,
  bias: Array,
  projection: Array,
  *,
  convolve: Callable[..., Array],
) -> tuple[Array, Array]:
  """See `silu_depthwise_conv`."""
  y = activated(x, kernel, bias, convolve=convolve)
  return y, project(y, projection)


def after_relu(
  x: Array, bias: Array, kernel: Array, *, convolve: Callable[..., Array]
) -> Array:
  """See `relu_depthwise_conv`."""
  return convolve(relu(biased(x, bias)), kernel)


def project(y: Array, projection: Array) -> Array:
  """Returns y @ projection: [B, H, W, D] and [D, P] to [B, H, W, P]."""
  return y @ projection.astype(y.dtype)


def biased(y: Array, bias: Array) -> Array:
  """Adds the bias in the dtype of `y`."""
  return y + with_rank_of(y, bias.astype(y.dtype))


def grouped(
  x: Array, kernel: Array, *, stride: int, padding: Padding | None = None
) -> Array:
  """Convolves by XLA's grouped convolution."""
  dtype = state_dtype(x, kernel)
  y = stencil.grouped_convolution(
    x.astype(dtype),
    kernel.astype(dtype),
    stride=stride,
    padding=padding or _centred(kernel),
  )
  return y.astype(x.dtype)


def shifted(
  x: Array,
  kernel: Array,
  *,
  stride: int,
  padding: Padding | None = None,
  dtype: DTypeLike | None = None,
) -> Array:
  """Convolves by shifted products; `dtype` is the result's, None for x's."""
  _, height, width, _ = x.shape
  y = stencil.correlate(
    _pad(x, padding or _centred(kernel)),
    _weights(x, kernel),
    _taps(kernel),
    height=(height - 1) // stride + 1,
    width=(width - 1) // stride + 1,
    stride=stride,
  )
  return y.astype(dtype or x.dtype)


def shifted_to_input(
  x: Array,
  kernel: Array,
  g: Array,
  *,
  stride: int,
  padding: Padding | None = None,
) -> Array:
  """Returns the cotangent of `x`, as a sum of shifted products."""
  _, height, width, _ = x.shape
  befores = [before for before, _ in padding or _centred(kernel)]
  around = [
    _around(size, spread, taps, before, stride)
    for size, spread, taps, before in zip(
      x.shape[1:3], g.shape[1:3], kernel.shape, befores, strict=False
    )
  ]
  zero = jnp.zeros((), g.dtype)
  spread = jax.lax.pad(g, zero, ((0, 0, 0), *around, (0, 0, 0)))
  weights = _weights(x, kernel)
  dx = stencil.correlate(
    spread, weights, _taps(kernel)[::-1], height=height, width=width
  )
  return dx.astype(x.dtype)


def _around(size, spread, taps, before, stride):
  """Returns the padding of a cotangent, for its correlation with all taps.

  The transpose of a stride inserts zeros between the cotangents.
  """
  first = taps - 1 - before
  return first, size + before - (spread - 1) * stride - 1, stride - 1


def _shifted_bwd(x, kernel, g, *, stride, padding):
  dx = shifted_to_input(x, kernel, g, stride=stride, padding=padding)
  dweights = stencil.weight_gradient(
    _pad(x, padding or _centred(kernel)),
    g.astype(state_dtype(x, kernel)),
    _taps(kernel),
    stride=stride,
  )
  return dx, dweights.reshape(kernel.shape).astype(kernel.dtype)


def _taps(kernel: Array) -> Sequence[tuple[int, int]]:
  rows, columns, _ = kernel.shape
  return tuple(itertools.product(range(rows), range(columns)))


def _centred(kernel: Array) -> Padding:
  rows, columns, _ = kernel.shape
  return (rows // 2, rows // 2), (columns // 2, columns // 2)


def _weights(x, kernel):
  return kernel.reshape(-1, kernel.shape[-1]).astype(state_dtype(x, kernel))


def _pad(x, padding):
  return jnp.pad(x, ((0, 0), *padding, (0, 0)))
