"""Depthwise stencils as sums of shifted products, and as XLA's convolution.

Shifted products are one fused pass over memory. XLA's grouped convolution is 8
to 18 times slower on a CPU, and reads the input several times on a GPU. On a
TPU it is better: compiled for a v5e, the grouped convolution of stage 1 takes
0.4 of the cycles of shifted products, and a third of the bytes. A stencil is a
static sequence of (row, column) offsets into a padded image, the taps, with a
weight for each tap and channel.
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
    padded: input, channels last. More axes may precede the channels.
    weights: a weight for each tap and channel; the sum has their dtype.
    offsets: (r_t, c_t) of each tap, from the first row and column of `padded`.
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
  # This rounds nothing, but prevents a fusion: on a CPU, a reduction that
  # follows (a LayerNorm, a cotangent) would compute all taps and take 20 times
  # as long.
  bits = jnp.finfo(total.dtype)
  return jax.lax.reduce_precision(total, bits.nexp, bits.nmant)


def _sliced_once(weights):
  """Returns the same weights, as the result of a sum.

  In a scan over blocks the weights are a slice of the stage's weights. XLA
  would fuse the slice into each product, which a CPU then does not vectorise:
  it was 6 times slower. XLA does not recompute a sum in its consumers.
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
  """Returns the cotangent of `weights` in `correlate`.

  Args:
    padded: as for `correlate`.
    cotangent: the cotangent of the output; its dtype is the result's.
    offsets: as for `correlate`.
    stride: as for `correlate`.
  """
  _, height, width, *_ = cotangent.shape
  all_but_channels = tuple(range(cotangent.ndim - 1))

  def tap(cotangent, window):
    return jnp.sum(cotangent * window.astype(cotangent.dtype), all_but_channels)

  # On a CPU, code for each tap of each convolution would double the compile
  # time of a training step.
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

  # On a GPU, one pass over the arrays then serves several taps.
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
  padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
) -> Float[Array, "B Ho Wo D"]:
  """Computes XLA's depthwise convolution, with sums in the dtype of `x`."""
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    (stride, stride),
    padding,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
    precision=jax.lax.Precision.HIGHEST,
  )
