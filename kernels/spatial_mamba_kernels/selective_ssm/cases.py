"""The selective SSM, for tests, benchmarks and ahead-of-time compilation."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp

from spatial_mamba_kernels.case import Argument, Case, Sizes
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.selective_ssm import api
from spatial_mamba_kernels.selective_ssm.plans import piece, row_length


def _arguments(sizes: Sizes, dtype: Any) -> dict[str, Argument]:
  tokens = sizes.batch, math.prod(sizes.image[1:])
  values = Argument((*tokens, sizes.channels), dtype)
  projection = Argument((*tokens, sizes.states), dtype)
  channel = Argument((sizes.channels,))
  return {
    "u": values,
    "delta": values,
    "A": Argument(
      (sizes.channels, sizes.states), of_normal=lambda x: -jnp.exp(x)
    ),
    "B": projection,
    "C": projection,
    "D": channel,
    "delta_bias": channel,
  }


def _loop_tokens(arrays: Arrays) -> dict[str, int]:
  tokens = piece(arrays[2].shape[1])
  names = "forward", "backward", "summary"
  return {f"selective_ssm_{name}": tokens for name in names}


_sequential = partial(api.selective_ssm, implementation="sequential")
CASES = (
  Case(
    operator=api.operator,
    function=api.selective_ssm,
    arguments=_arguments,
    reference=_sequential,
    rivals={
      "associative": partial(api.selective_ssm, implementation="associative"),
      "sequential": _sequential,
    },
    gpu_kernels=(1, 1),
    loop_tokens=_loop_tokens,
    tpu_row=lambda sizes: row_length(sizes.height * sizes.width),
  ),
)
