"""Values inside a block, which the forward pass does not return.

Axis letters: B batch, H and W height and width, C channels, D inner channels, N
states.
"""

from typing import Any

from jax.typing import ArrayLike
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.backbone import Trunk, check_images
from spatial_mamba_jax.models.mixers.base import Mixer
from spatial_mamba_jax.models.mixers.structure_aware import (
  States,
  StructureAwareSSM,
)


def block_states(
  model: Trunk, images: ArrayLike, stage: int, block: int
) -> States:
  """Returns a block's states before and after fusion (equations 2 and 4).

      states = block_states(model, images, stage=2, block=0)
      states.before  # [B, H / 16, W / 16, 512, 1] of the tiny model
      jit = nnx.jit(block_states, static_argnames=("stage", "block"))

  It runs the network up to this block, and computes the block's states by
  `selective_scan` and `state_fusion`. The forward pass itself fuses these
  operators, and never writes the states to memory.

  Args:
    model: from `create_model` or `create_backbone`, in eval mode.
    images: as for `SpatialMamba`.
    stage: index of the stage, from 0.
    block: index of the block in its stage, from 0.

  Returns:
    `before` and `after`, [B, H / (4 * 2**stage), W / (4 * 2**stage), D, N]
    (rounded up) with D = expand * dims[stage] and N = d_state, float32 (float64
    if the model's dtype is float64).

  Raises:
    ValueError: there is no such block, its mixer has no states, the model is in
      training mode, or `images` has a wrong shape or dtype.
  """
  mixer, x = mixer_input(model, images, stage, block)
  if not isinstance(mixer, StructureAwareSSM):
    raise ValueError(
      "only blocks with the structure-aware mixer have states, not those with a"
      f" {type(mixer).__name__}"
    )
  return mixer.states(x)


def mixer_input(
  model: Trunk, images: ArrayLike, stage: int, block: int
) -> tuple[Mixer, Float[Array, "B H W C"]]:
  """Runs the network up to a block; returns the block's mixer and its input.

  Args:
    model: from `create_model` or `create_backbone`, in eval mode.
    images: as for `SpatialMamba`.
    stage: index of the stage, from 0.
    block: index of the block in its stage, from 0.

  Raises:
    ValueError: there is no such block, it has no method `mixer_input`, the
      model is in training mode, or `images` has a wrong shape or dtype.
  """
  depths = model.config.depths
  if not (0 <= stage < len(depths) and 0 <= block < depths[stage]):
    raise ValueError(
      f"there is no block {block} in a stage {stage}: the stages"
      f" {tuple(range(len(depths)))} have {depths} blocks, counted from 0"
    )
  if not model.deterministic:
    raise ValueError("states need eval mode: call model.eval() first")
  channels, dtype = model.config.in_channels, model.config.dtype
  x = model.stem(check_images(images, channels).astype(dtype))
  for i in range(stage):
    x = model.downsamples[i](model.stages[i](x))
  for earlier in model.stages[stage].blocks[:block]:
    x = earlier(x)
  last: Any = model.stages[stage].blocks[block]
  if not hasattr(last, "mixer_input"):
    raise ValueError(
      f"the input of the mixer is not known: a {type(last).__name__} has no"
      " method mixer_input"
    )
  return last.mixer, last.mixer_input(x)
