"""The normalisations, for tests, benchmarks and ahead-of-time compilation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.case import (
  Argument,
  Case,
  Sizes,
  dropped,
  per_channel,
)
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.drop_path import drop_path
from spatial_mamba_kernels.gpu.tokens import Tokens
from spatial_mamba_kernels.layer_norm import api
from spatial_mamba_kernels.typing import Array


def _arguments(
  sizes: Sizes, dtype: Any, *, is_gated: bool
) -> dict[str, Argument]:
  image, channel = (*sizes.image, sizes.channels), Argument((sizes.channels,))
  arguments = {
    "x": Argument(image, dtype, lambda x: 3 + x),
    "scale": channel,
    "bias": channel,
  }
  if is_gated:
    arguments["gate"] = Argument(image, dtype)
    arguments["branch_scale"] = Argument((sizes.batch,), of_normal=dropped)
  return arguments


def _residual(x: Array, scale: Array, bias: Array) -> tuple[Array, Array]:
  centred = x - x.mean(-1, keepdims=True)
  var = jnp.square(centred).mean(-1, keepdims=True)
  y = centred / jnp.sqrt(var + 1e-5)
  return x, y * per_channel(scale) + per_channel(bias)


def _gated(
  x: Array, scale: Array, bias: Array, gate: Array, branch_scale: Array
) -> Array:
  _, y = _residual(x, scale, bias)
  return drop_path(y * jax.nn.silu(gate), branch_scale)


def _loop_tokens(name: str, arrays: Arrays) -> dict[str, int]:
  count = Tokens(arrays[0].shape[-1]).count
  return {f"{name}_{x}": count for x in ("forward", "backward")}


CASES = (
  Case(
    operator=api.residual_operator,
    function=api.residual_layer_norm,
    arguments=partial(_arguments, is_gated=False),
    reference=_residual,
    rivals={"XLA": partial(api.residual_layer_norm, implementation="xla")},
    gpu_kernels=(1, 1),
    loop_tokens=partial(_loop_tokens, "residual_layer_norm"),
  ),
  Case(
    operator=api.gated_operator,
    function=api.gated_layer_norm,
    arguments=partial(_arguments, is_gated=True),
    reference=_gated,
    rivals={"XLA": partial(api.gated_layer_norm, implementation="xla")},
    gpu_kernels=(1, 1),
    loop_tokens=partial(_loop_tokens, "gated_layer_norm"),
    # As of `silu_depthwise_conv`, without a convolution.
    roundings=8,
  ),
)
