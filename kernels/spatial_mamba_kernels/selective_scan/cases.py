"""The selective scan, for tests, benchmarks and ahead-of-time compilation."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp

from spatial_mamba_kernels.case import Argument, Case, Sizes
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.gpu import tiles
from spatial_mamba_kernels.selective_scan import api
from spatial_mamba_kernels.tpu.plan import row_length


def _arguments(sizes: Sizes, dtype: Any) -> dict[str, Argument]:
  tokens = sizes.batch, math.prod(sizes.image[1:])
  channels, states = sizes.channels, sizes.states
  return {
    "u": Argument((*tokens, channels), dtype),
    "delta": Argument((*tokens, channels), dtype),
    "A": Argument((channels, states), of_normal=lambda x: -jnp.exp(x)),
    "B": Argument((*tokens, states), dtype),
    "delta_bias": Argument((channels,)),
    "h0": Argument((sizes.batch, channels, states)),
  }


def _loop_tokens(arrays: Arrays) -> dict[str, int]:
  tile = tiles.tokens_of_tile(arrays[2].shape[1])
  names = "forward", "backward", "summary"
  return {f"selective_scan_{name}": tile for name in names}


_sequential = partial(api.selective_scan, implementation="sequential")
CASES = (
  Case(
    operator=api.operator,
    function=api.selective_scan,
    arguments=_arguments,
    reference=_sequential,
    rivals={
      "associative": partial(api.selective_scan, implementation="associative"),
      "sequential": _sequential,
    },
    gpu_kernels=(1, 1),
    loop_tokens=_loop_tokens,
    tpu_row=lambda sizes: row_length(sizes.height * sizes.width),
  ),
)
