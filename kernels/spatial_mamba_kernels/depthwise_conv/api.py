"""Depthwise convolution, alone and, if it is 3x3, fused with its neighbours."""

import functools
from functools import partial
from typing import Any

from jax import Array
from jax.typing import ArrayLike

from spatial_mamba_kernels.depthwise_conv import plans, xla
from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.implementation import check_implementation
from spatial_mamba_kernels.shapes import check_shapes


def depthwise_conv(
  x: ArrayLike,
  kernel: ArrayLike,
  *,
  stride: int = 1,
  implementation: str | None = None,
) -> Array:
  """Convolves each channel with its own kernel, without a bias.

  It computes the same as the following, but is far faster on a CPU and moves
  less memory on a GPU:

      jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), ((R // 2,) * 2, (S // 2,) * 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=D)

  Args:
    x: [B, H, W, D].
    kernel: [R, S, D] (row, column, channel), with odd R and S.
    stride: 1 or more.
    implementation: None (best for the platform), "mosaic_gpu" (a kernel, for 3
      x 3) or "xla" (no kernel). "sequential" and "associative" mean "xla" here.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), D] in the dtype of `x`; sums are in
    float32, or float64 for float64 inputs.

  Raises:
    ValueError: the shapes are inconsistent, R or S is even, stride < 1, or the
      implementation is unknown.
    NotImplementedError: the named kernel does not exist, or cannot serve these
      arrays.
  """
  check_implementation(implementation, "depthwise_conv")
  if stride < 1:
    raise ValueError(f"depthwise_conv: stride must be 1 or more, not {stride}")
  x, kernel = check_shapes(
    "depthwise_conv", {"x": (x, "B H W D"), "kernel": (kernel, "R S D")}
  )
  rows, columns, _ = kernel.shape
  if not rows % 2 or not columns % 2:
    raise ValueError(
      f"depthwise_conv: a kernel has odd sizes, not {rows} x {columns}"
    )
  return operator(stride)((x, kernel), implementation)


def causal_depthwise_conv(x: ArrayLike, kernel: ArrayLike) -> Array:
  """Convolves each channel of a sequence with its own kernel, without a bias.

  A token's result depends on this token and on those before it:

      y[t] = sum over k of kernel[k] * x[t - (K - 1) + k]    # x[-1] etc. are 0

  Args:
    x: [B, L, D].
    kernel: [K, D].

  Returns:
    [B, L, D] in the dtype of `x`; sums are in float32, or float64 for float64
    inputs.

  Raises:
    ValueError: the shapes are inconsistent.
  """
  x, kernel = check_shapes(
    "causal_depthwise_conv", {"x": (x, "B L D"), "kernel": (kernel, "K D")}
  )
  padding = (0, 0), (len(kernel) - 1, 0)
  y: Any = xla.convolve(x[:, None], kernel[None], 1, padding)
  return y[:, 0]


def residual_depthwise_conv(
  x: ArrayLike,
  kernel: ArrayLike,
  bias: ArrayLike,
  *,
  implementation: str | None = None,
) -> Array:
  """Computes x + depthwise_conv(x, kernel) + bias.

  Args:
    x: [B, H, W, D].
    kernel: [3, 3, D].
    bias: [D].
    implementation: as for `depthwise_conv`.

  Returns:
    [B, H, W, D] in the dtype of `x`.

  Raises:
    ValueError: see `depthwise_conv`.
    NotImplementedError: see `depthwise_conv`.
  """
  check_implementation(implementation, "residual_depthwise_conv")
  arrays = check_shapes(
    "residual_depthwise_conv",
    {
      "x": (x, "B H W D"),
      "kernel": (kernel, "3 3 D"),
      "bias": (bias, "D"),
    },
  )
  return residual_operator(tuple(arrays), implementation)


def silu_depthwise_conv(
  x: ArrayLike,
  kernel: ArrayLike,
  bias: ArrayLike,
  projection: ArrayLike,
  *,
  implementation: str | None = None,
) -> tuple[Array, Array]:
  """Computes y = silu(depthwise_conv(x, kernel) + bias), and y @ projection.

  If JAX's default device is a GPU, the backward pass recomputes the
  convolution. Otherwise it is saved, unless `jax.checkpoint` says otherwise.

  Args:
    x: [B, H, W, D].
    kernel: [3, 3, D].
    bias: [D].
    projection: [D, P], cast to the dtype of `x`.
    implementation: as for `depthwise_conv`; the kernel serves P up to 20.

  Returns:
    [B, H, W, D] and [B, H, W, P] in the dtype of `x`.

  Raises:
    ValueError: see `depthwise_conv`.
    NotImplementedError: see `depthwise_conv`.
  """
  check_implementation(implementation, "silu_depthwise_conv")
  arrays = check_shapes(
    "silu_depthwise_conv",
    {
      "x": (x, "B H W D"),
      "kernel": (kernel, "3 3 D"),
      "bias": (bias, "D"),
      "projection": (projection, "D P"),
    },
  )
  return projected_operator(tuple(arrays), implementation)


def relu_depthwise_conv(
  x: ArrayLike,
  bias: ArrayLike,
  kernel: ArrayLike,
  *,
  stride: int,
  implementation: str | None = None,
) -> Array:
  """Computes depthwise_conv(relu(x + bias), kernel) with a stride.

  The bias is that of the linear layer before it: the kernel of the backward
  pass computes its cotangent too, so that it reads x once for all cotangents.

  Args:
    x: [B, H, W, D].
    bias: [D], cast to the dtype of `x`.
    kernel: [3, 3, D].
    stride: 2 or more.
    implementation: as for `depthwise_conv`.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), D] in the dtype of `x`.

  Raises:
    ValueError: see `depthwise_conv`; or stride < 2.
    NotImplementedError: see `depthwise_conv`.
  """
  check_implementation(implementation, "relu_depthwise_conv")
  if stride < 2:
    raise ValueError(
      f"relu_depthwise_conv: stride must be 2 or more, not {stride}"
    )
  x, bias, kernel = check_shapes(
    "relu_depthwise_conv",
    {"x": (x, "B H W D"), "bias": (bias, "D"), "kernel": (kernel, "3 3 D")},
  )
  return relu_operator(stride)((x, bias, kernel), implementation)


def _operator(name, form, dimensions, *, stride=1):
  def run(arrays: Arrays, *, implementation: str | None) -> Any:
    del implementation
    return form.forward(*arrays, convolve=partial(xla.convolve, stride=stride))

  return Operator(
    name,
    run,
    plans.kernels(form) if stride == 1 else {},
    dimensions,
    is_chosen_in_tracing=form.has_silu,
    is_named=False,
  )


@functools.cache
def operator(stride: int) -> Operator:
  """Returns the convolution of (x, kernel) with a stride."""
  return _operator(
    "depthwise_conv", plans.PLAIN, plans.PLAIN_DIMENSIONS, stride=stride
  )


residual_operator = _operator(
  "residual_depthwise_conv", plans.RESIDUAL, plans.DIMENSIONS
)
silu_operator = _operator("silu_depthwise_conv", plans.SILU, plans.DIMENSIONS)


def _project_apart(arrays: Arrays, *, implementation: str | None) -> Any:
  *convolved, projection = arrays
  y = silu_operator(tuple(convolved), implementation)
  return y, xla.project(y, projection)


projected_operator = Operator(
  "projected_depthwise_conv",
  _project_apart,
  plans.kernels(plans.PROJECTED),
  plans.PROJECTED_DIMENSIONS,
  is_chosen_in_tracing=True,
  is_named=False,
)


@functools.cache
def relu_operator(stride: int) -> Operator:
  """Returns the convolution of (x, bias, kernel) after ReLU, with a stride."""

  def run(arrays: Arrays, *, implementation: str | None) -> Any:
    del implementation
    return xla.after_relu(
      *arrays, convolve=partial(xla.convolve, stride=stride)
    )

  return Operator(
    "relu_depthwise_conv",
    run,
    plans.strided_kernels(stride),
    plans.STRIDED_DIMENSIONS,
    # XLA saves the values after ReLU, the kernel nothing.
    is_chosen_in_tracing=True,
    is_named=False,
  )
