"""Depthwise 3x3 convolution, stride 1 or 2, zero padding."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from spatial_mamba_kernels import stencil
from spatial_mamba_kernels.shapes import check_shapes, state_dtype
from spatial_mamba_kernels.typing import Array, Float

_TAPS = tuple((row, column) for row in range(3) for column in range(3))
_FLIPPED_TAPS = _TAPS[::-1]


def depthwise_conv(
  x: ArrayLike, kernel: ArrayLike, *, stride: int = 1
) -> Array:
  """Convolves each channel with its own 3x3 kernel, without a bias.

  Equal to, but far faster on a CPU and lighter on memory elsewhere than:

      jax.lax.conv_general_dilated(
        x, kernel[:, :, None, :], (stride, stride), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=D)

  Args:
    x: [B, H, W, D].
    kernel: [3, 3, D] (row, column, channel).
    stride: 1 or more.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), D] in the dtype of `x`; sums are in
    float32, or float64 for float64 inputs.

  Raises:
    ValueError: the shapes are inconsistent, or stride < 1.
  """
  if stride < 1:
    raise ValueError(f"depthwise_conv: stride must be 1 or more, not {stride}")
  x, kernel = check_shapes(
    "depthwise_conv", {"x": (x, "B H W D"), "kernel": (kernel, "3 3 D")}
  )
  weights = kernel.reshape(9, -1).astype(state_dtype(x, kernel))
  return _convolve(x, weights, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(
  x: Float[Array, "B H W D"], weights: Float[Array, "9 D"], stride: int
) -> Float[Array, "B Ho Wo D"]:
  _, height, width, _ = x.shape
  y = stencil.correlate(
    _pad(x),
    weights,
    _TAPS,
    height=-(-height // stride),
    width=-(-width // stride),
    stride=stride,
  )
  return y.astype(x.dtype)


def _convolve_fwd(x, weights, stride):
  return _convolve(x, weights, stride), (x, weights)


def _convolve_bwd(stride, residuals, g):
  x, weights = residuals
  _, height, width, _ = x.shape
  # The transpose of a stride is zeros between the cotangents.
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
  dx = stencil.correlate(
    spread, weights, _FLIPPED_TAPS, height=height, width=width
  )
  dweights = stencil.weight_gradient(
    _pad(x), g.astype(weights.dtype), _TAPS, stride=stride
  )
  return dx.astype(x.dtype), dweights


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _pad(x):
  return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
