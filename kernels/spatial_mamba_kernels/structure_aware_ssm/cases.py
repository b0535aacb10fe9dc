"""The SSM, for tests, benchmarks and ahead-of-time compilation."""

import contextlib
from functools import partial
from typing import Any

import jax.numpy as jnp

from spatial_mamba_kernels.case import Argument, Case, Sizes
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.gpu import tiles
from spatial_mamba_kernels.gpu.plan import cut_to_fuse, cut_to_states
from spatial_mamba_kernels.structure_aware_ssm import (
  api,
  gpu_fused,
  mosaic_gpu,
)
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL


def _arguments(sizes: Sizes, dtype: Any) -> dict[str, Argument]:
  image, channels = sizes.image, sizes.channels
  values = Argument((*image, channels), dtype)
  projection = Argument((*image, sizes.states), dtype)
  channel = Argument((channels,))
  return {
    "u": values,
    "delta": values,
    "A": Argument((channels, sizes.states), of_normal=lambda x: -jnp.exp(x)),
    "B": projection,
    "C": projection,
    "D": channel,
    "kernels": Argument((3, 3, 3, channels)),
    "alpha": Argument((3,)),
    "delta_bias": channel,
  }


def _loop_tokens(arrays: Arrays) -> dict[str, int]:
  u, delta, *_ = arrays
  name = "structure_aware_ssm"
  tile = tiles.tokens_of_tile(1)
  cut = u.shape, STENCIL, jnp.float32, u.dtype
  strip = cut_to_fuse(*cut).strip
  tokens = {
    **{f"selective_scan_{x}": tile for x in ("forward", "backward", "summary")},
    "state_fusion_forward": strip,
    "state_fusion_weights": strip,
    "state_fusion_states": cut_to_states(*cut).strip,
  }
  # Where it is not composed of the kernels above.
  with contextlib.suppress(NotImplementedError):
    types = u.shape, u.dtype, delta.dtype
    tokens[f"{name}_forward"] = gpu_fused.share(*types).columns
    columns = mosaic_gpu.share_backward(*types).columns
    tokens[f"{name}_backward"] = columns
    tokens[f"{name}_observation_backward"] = columns
  return tokens


_sequential = partial(api.structure_aware_ssm, implementation="sequential")
CASES = (
  Case(
    operator=api.operator,
    function=api.structure_aware_ssm,
    arguments=_arguments,
    reference=_sequential,
    rivals={
      "associative": partial(
        api.structure_aware_ssm, implementation="associative"
      ),
      "sequential": _sequential,
    },
    gpu_kernels=(1, 2),
    older_gpu_kernels=(2, 4),
    loop_tokens=_loop_tokens,
  ),
)
