"""The MLP, for tests, benchmarks and ahead-of-time compilation."""

from functools import partial
from typing import Any

import jax

from spatial_mamba_kernels.case import (
  Argument,
  Case,
  Sizes,
  dropped,
  of_bfloat16,
  per_channel,
)
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.drop_path import drop_path
from spatial_mamba_kernels.mlp import api, gpu_weights
from spatial_mamba_kernels.mlp.plans import TOKENS
from spatial_mamba_kernels.typing import Array


def _arguments(
  sizes: Sizes, dtype: Any, *, hidden: int | None = None
) -> dict[str, Argument]:
  """A block's input has half as many channels as its mixer.

  Weights are numbers that bfloat16 has, because they may be cast to that.
  """
  channels = sizes.channels // 2
  hidden = hidden or 4 * channels
  image = Argument((*sizes.image, channels), dtype, of_bfloat16())
  return {
    "x": image,
    "w1": Argument((channels, hidden), of_normal=of_bfloat16(channels**-0.5)),
    "b1": Argument((hidden,), of_normal=of_bfloat16()),
    "w2": Argument((hidden, channels), of_normal=of_bfloat16(hidden**-0.5)),
    "b2": Argument((channels,), of_normal=of_bfloat16()),
    "residual": image,
    "branch_scale": Argument((sizes.batch,), of_normal=dropped),
  }


def _reference(
  x: Array,
  w1: Array,
  b1: Array,
  w2: Array,
  b2: Array,
  residual: Array,
  branch_scale: Array,
) -> Array:
  with jax.default_matmul_precision("highest"):
    branch = jax.nn.gelu(x @ w1 + per_channel(b1), approximate=False)
    branch = branch @ w2 + per_channel(b2)
  return residual + drop_path(branch, branch_scale)


def _loop_tokens(arrays: Arrays) -> dict[str, int]:
  """Of some hidden units."""
  del arrays
  return {
    "mlp_forward": TOKENS,
    "mlp_backward": TOKENS,
    "mlp_backward_whole": gpu_weights.PIECE,
    "mlp_weights": gpu_weights.PIECE,
  }


CASES = (
  Case(
    operator=api.operator,
    function=api.mlp,
    arguments=_arguments,
    reference=_reference,
    rivals={"XLA": partial(api.mlp, implementation="xla")},
    gpu_kernels=(1, 1),
    is_for_every_gpu=False,
    loop_tokens=_loop_tokens,
  ),
)
