"""Depthwise 3x3 convolution in plain JAX; see `stencil` for its two forms."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spatial_mamba_kernels import stencil
from spatial_mamba_kernels.activations import relu, silu
from spatial_mamba_kernels.shapes import state_dtype, with_rank_of
from spatial_mamba_kernels.sharding import check_only_batch_is_split
from spatial_mamba_kernels.typing import Array, Float

_TAPS = tuple((row, column) for row in range(3) for column in range(3))
_FLIPPED_TAPS = _TAPS[::-1]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
  x: Float[Array, "B H W D"], kernel: Float[Array, "3 3 D"], stride: int
) -> Float[Array, "B Ho Wo D"]:
  """See `depthwise_conv`."""
  check_only_batch_is_split(x)
  return jax.lax.platform_dependent(
    x,
    kernel,
    tpu=partial(grouped, stride=stride),
    default=partial(shifted, stride=stride),
  )


def _convolve_fwd(x, kernel, stride):
  return convolve(x, kernel, stride), (x, kernel)


def _convolve_bwd(stride, residuals, g):
  def grouped_bwd(x, kernel, g):
    return jax.vjp(partial(grouped, stride=stride), x, kernel)[1](g)

  return jax.lax.platform_dependent(
    *residuals,
    g,
    tpu=grouped_bwd,
    default=partial(_shifted_bwd, stride=stride),
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


def grouped(x: Array, kernel: Array, *, stride: int) -> Array:
  """Convolves by XLA's grouped convolution."""
  dtype = state_dtype(x, kernel)
  y = stencil.grouped_convolution(
    x.astype(dtype), kernel.astype(dtype), stride=stride, padding=1
  )
  return y.astype(x.dtype)


def shifted(
  x: Array, kernel: Array, *, stride: int, dtype: DTypeLike | None = None
) -> Array:
  """Convolves by shifted products; `dtype` is the result's, None for x's."""
  _, height, width, _ = x.shape
  y = stencil.correlate(
    _pad(x),
    _weights(x, kernel),
    _TAPS,
    height=(height - 1) // stride + 1,
    width=(width - 1) // stride + 1,
    stride=stride,
  )
  return y.astype(dtype or x.dtype)


def shifted_to_input(
  x: Array, kernel: Array, g: Array, *, stride: int
) -> Array:
  """Returns the cotangent of `x`, as a sum of shifted products."""
  _, height, width, _ = x.shape
  # The transpose of a stride inserts zeros between the cotangents.
  spread = jax.lax.pad(
    g,
    jnp.zeros((), g.dtype),
    (
      (0, 0, 0),
      (1, height - (g.shape[1] - 1) * stride, stride - 1),
      (1, width - (g.shape[2] - 1) * stride, stride - 1),
      (0, 0, 0),
    ),
  )
  weights = _weights(x, kernel)
  dx = stencil.correlate(
    spread, weights, _FLIPPED_TAPS, height=height, width=width
  )
  return dx.astype(x.dtype)


def _shifted_bwd(x, kernel, g, *, stride):
  dx = shifted_to_input(x, kernel, g, stride=stride)
  dweights = stencil.weight_gradient(
    _pad(x), g.astype(state_dtype(x, kernel)), _TAPS, stride=stride
  )
  return dx, dweights.reshape(kernel.shape).astype(kernel.dtype)


def _weights(x, kernel):
  return kernel.reshape(9, -1).astype(state_dtype(x, kernel))


def _pad(x):
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
