"""State fusion, for tests, benchmarks and ahead-of-time compilation."""

from functools import partial
from typing import Any

from spatial_mamba_kernels.case import Argument, Case, Sizes
from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.gpu.plan import cut_to_fuse, cut_to_states
from spatial_mamba_kernels.state_fusion import api
from spatial_mamba_kernels.taps import DILATIONS, Stencil


def _loop_tokens(arrays: Arrays) -> dict[str, int]:
  h, *_ = arrays
  cut = h.shape, Stencil(DILATIONS), h.dtype, h.dtype
  strip = cut_to_fuse(*cut).strip
  return {
    "state_fusion_forward": strip,
    "state_fusion_weights": strip,
    "state_fusion_states": cut_to_states(*cut).strip,
  }


def case(dilations: tuple[int, ...]) -> Case:
  """Returns the case of these dilations."""
  function = partial(api.state_fusion, dilations=dilations)

  def arguments(sizes: Sizes, dtype: Any) -> dict[str, Argument]:
    count, channels = len(dilations), sizes.channels
    return {
      "h": Argument((*sizes.image, channels), dtype),
      "kernels": Argument((count, 3, 3, channels)),
      "alpha": Argument((count,)),
    }

  xla = partial(function, implementation="associative")
  return Case(
    operator=api.operator(dilations),
    function=function,
    arguments=arguments,
    reference=partial(function, implementation="sequential"),
    rivals={"XLA": xla},
    gpu_kernels=(1, 2),
    loop_tokens=_loop_tokens,
  )


CASES = (case(DILATIONS),)
