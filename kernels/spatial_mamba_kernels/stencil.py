"""Depthwise stencils as sums of shifted products, and as XLA's convolution.

Shifted products are one fused pass over memory, where XLA's grouped convolution
is 8 to 18 times slower on a CPU and reads the input several times on a GPU. For
a TPU it is the other way round: compiled for a v5e, the grouped convolution of
stage 1 takes 0.4 of the cycles of shifted products, and a third of the bytes.
A stencil is a static tuple of (row, column) offsets into a padded image, and
one weight per offset and channel.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float, Size

Offsets = Sequence[tuple[int, int]]


def _window(
  padded: Float[Array, "B Hp Wp ..."],
  offset: tuple[int, int],
  height: Size,
  width: Size,
  stride: int,
) -> Float[Array, "B H W ..."]:
  row, column = offset
  return padded[
    :,
    row : row + (height - 1) * stride + 1 : stride,
    column : column + (width - 1) * stride + 1 : stride,
  ]


def correlate(
  padded: Float[Array, "B Hp Wp ..."],
  weights: Float[Array, "T D"],
  offsets: Offsets,
  *,
  height: Size,
  width: Size,
  stride: int = 1,
) -> Float[Array, "B H W ..."]:
  """y[b, i, j] = sum over t of weights[t] * padded[b, s*i + r_t, s*j + c_t].

  Args:
    padded: input, channels last (more axes may stand before the channels).
    weights: one weight per tap and channel; their dtype is that of the sum.
    offsets: (r_t, c_t) of every tap, counted from the corner of `padded`.
    height: H, rows of the output.
    width: W, columns of the output.
    stride: s.

  Returns:
    The output in the dtype of `weights`.
  """
  total = None
  weights = jax.lax.platform_dependent(
    weights, cpu=_sliced_once, default=lambda weights: weights
  )
  for weight, offset in zip(weights, offsets, strict=True):
    window = _window(padded, offset, height, width, stride)
    window = window.astype(weights.dtype)
    product = with_rank_of(window, weight) * window
    total = product if total is None else total + product
  assert total is not None
  # Rounds nothing. On a CPU a reduction that follows (a LayerNorm, a cotangent)
  # would take all taps into itself, which takes it 20 times as long.
  bits = jnp.finfo(total.dtype)
  return jax.lax.reduce_precision(total, bits.nexp, bits.nmant)


def _sliced_once(weights):
  """The same weights, of an operation of their own.

  In a loop over blocks they are a slice of their stage's. XLA would take that
  slice in each of the products, and a CPU then does not vectorise them: it was
  6 times as slow. A sum is not done again where its result is read.
  """
  first = jnp.arange(2)[:, None, None] == 0
  return jnp.sum(jnp.where(first, weights, 0), axis=0)


def weight_gradient(
  padded: Float[Array, "B Hp Wp ..."],
  cotangent: Float[Array, "B H W ..."],
  offsets: Offsets,
  *,
  stride: int = 1,
) -> Float[Array, "T D"]:
  """The cotangent of `weights` in `correlate`, in the cotangent's dtype."""
  _, height, width, *_ = cotangent.shape
  all_but_channels = tuple(range(cotangent.ndim - 1))

  def tap(cotangent, window):
    return jnp.sum(cotangent * window.astype(cotangent.dtype), all_but_channels)

  # A kernel for each tap of each convolution would double the time a CPU takes
  # to compile a training step.
  def loop(padded, cotangent):
    extent = (
      padded.shape[0],
      (height - 1) * stride + 1,
      (width - 1) * stride + 1,
      *padded.shape[3:],
    )

    def tap_at(offset):
      start = jnp.zeros(padded.ndim, offset.dtype).at[1:3].set(offset)
      window = jax.lax.dynamic_slice(padded, start, extent)
      return tap(cotangent, window[:, ::stride, ::stride])

    return jax.lax.map(tap_at, jnp.asarray(offsets, jnp.int32))

  # A GPU reads the arrays once for several taps.
  def unrolled(padded, cotangent):
    windows = (
      _window(padded, offset, height, width, stride) for offset in offsets
    )
    return jnp.stack([tap(cotangent, window) for window in windows])

  return jax.lax.platform_dependent(
    padded, cotangent, cpu=loop, default=unrolled
  )


def grouped_convolution(
  x: Float[Array, "B H W D"],
  kernel: Float[Array, "R S D"],
  *,
  stride: int = 1,
  dilation: int = 1,
  padding: int = 0,
) -> Float[Array, "B Ho Wo D"]:
  """XLA's depthwise convolution, each product and sum in the dtype of `x`."""
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    (stride, stride),
    ((padding, padding), (padding, padding)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
    precision=jax.lax.Precision.HIGHEST,
  )
