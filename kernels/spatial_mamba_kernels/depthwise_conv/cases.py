"""The convolutions, for tests, benchmarks and ahead-of-time compilation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.case import (
  Argument,
  Case,
  Sizes,
  of_bfloat16,
  per_channel,
)
from spatial_mamba_kernels.depthwise_conv import api, gpu_strided, plans, xla
from spatial_mamba_kernels.depthwise_conv.plans import Form
from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.typing import Array

# XLA's own convolution, not the shifted products of ours.
_convolve = partial(xla.grouped, stride=1)


def _arguments(
  sizes: Sizes, dtype: Any, *, form: Form, projected: int | None = None
) -> dict[str, Argument]:
  """By default to time steps from a sixteenth of a block's input, B and C."""
  channels = sizes.channels
  arguments = {
    "x": Argument((*sizes.image, channels), dtype),
    "kernel": Argument((3, 3, channels)),
  }
  if form is not plans.PLAIN:
    arguments["bias"] = Argument((channels,))
  if form.is_projected:
    projected = projected or -(-channels // 32) + 2 * sizes.states
    # It is cast to the type of x. A projection is no greater than what it is
    # made of, which is rounded first.
    arguments["projection"] = Argument(
      (channels, projected), of_normal=of_bfloat16(channels**-0.5)
    )
  return arguments


def _residual(x: Array, kernel: Array, bias: Array) -> Array:
  return x + (_convolve(x, kernel) + per_channel(bias))


def _silu(x: Array, kernel: Array, bias: Array) -> Array:
  return jax.nn.silu(_convolve(x, kernel) + per_channel(bias))


def _projected(
  x: Array, kernel: Array, bias: Array, projection: Array
) -> tuple[Array, Array]:
  y = _silu(x, kernel, bias)
  return y, y @ projection


def _apart(
  x: Array,
  kernel: Array,
  bias: Array,
  *,
  implementation: str | None = None,
) -> Array:
  """What `silu_depthwise_conv` is where its projection is XLA's."""
  return api.silu_operator((x, kernel, bias), implementation)


def _case(
  operator: Operator,
  function: Callable[..., Any],
  form: Form,
  reference: Callable[..., Any],
  **options: Any,
) -> Case:
  return Case(
    operator=operator,
    function=function,
    arguments=partial(_arguments, form=form),
    reference=reference,
    rivals={"XLA": partial(form.forward, convolve=_convolve)},
    gpu_kernels=(0, 1),
    loop_tokens=lambda arrays: {
      "depthwise_conv_backward": plans.cut(arrays[0], form).strip
    },
    **options,
  )


def strided_case(stride: int) -> Case:
  """Returns the case of `relu_depthwise_conv` with a stride."""

  def loop_tokens(arrays: Arrays) -> dict[str, int]:
    # A run of the loop computes all inputs for which a result stands.
    count = stride**2 * gpu_strided.tokens_of(arrays[0].shape[-1]).count
    return {"relu_depthwise_conv_backward": count}

  convolve = partial(xla.grouped, stride=stride)
  return Case(
    operator=api.relu_operator(stride),
    function=partial(api.relu_depthwise_conv, stride=stride),
    arguments=_strided_arguments,
    reference=partial(_after_relu, convolve=convolve),
    rivals={"XLA": partial(xla.after_relu, convolve=convolve)},
    gpu_kernels=(0, 1),
    loop_tokens=loop_tokens,
  )


def _strided_arguments(sizes: Sizes, dtype: Any) -> dict[str, Argument]:
  """Draws x and bias such that ReLU does not depend on how they are rounded."""
  channels = sizes.channels
  return {
    "x": Argument((*sizes.image, channels), dtype, _sixteenths),
    "bias": Argument((channels,), of_normal=_sixteenths),
    "kernel": Argument((3, 3, channels)),
  }


def _sixteenths(x: Array) -> Array:
  """Rounds to multiples of 1/16 up to 4; bfloat16 has the sums of two."""
  return (jnp.round(16 * x) / 16).clip(-4, 4)


def _after_relu(
  x: Array, bias: Array, kernel: Array, *, convolve: Callable[..., Array]
) -> Array:
  return convolve(jax.nn.relu(x + per_channel(bias)), kernel)


CASES = (
  _case(api.operator(1), api.depthwise_conv, plans.PLAIN, _convolve),
  _case(
    api.residual_operator,
    api.residual_depthwise_conv,
    plans.RESIDUAL,
    _residual,
  ),
  # Six times in SiLU's derivative, and before and after that what it is of.
  _case(api.silu_operator, _apart, plans.SILU, _silu, roundings=11),
  _case(
    api.projected_operator,
    api.silu_depthwise_conv,
    plans.PROJECTED,
    _projected,
    roundings=11,
  ),
  strided_case(2),
)
