"""Vision Mamba (arXiv 2401.09417): the raster in both directions.

It computes what `Mamba` of github.com/hustvl/Vim, commit dd0358a, computes with
`bimamba_type="v2"` and `if_divide_out=True`, as in all released models. Unlike
the paper's algorithm 1, the code halves the sum of both directions and adds the
skip connection D. The authors' class token is not a token of the image; the
networks here have none.

Axis letters: B batch, H and W height and width, L = H * W tokens, C channels, D
inner channels, E = 2 D.
"""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.layers import halves, scaled, uniform_linear
from spatial_mamba_jax.models.mixers.mamba import mamba_out_proj
from spatial_mamba_jax.models.mixers.scans import RASTER, REVERSED_RASTER
from spatial_mamba_jax.models.mixers.selective import (
  MambaBranch,
  SelectiveConfig,
)

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# What the tokens select for the forward and for the backward scan, each in the
# order of its scan.
Operands = tuple[Array, Array]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class VimConfig(SelectiveConfig):
  """A scan of the raster and one from its end; see `SelectiveConfig`."""

  name: ClassVar[str] = "vim"

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "Vim":
    """Creates the mixer of a block; see `MixerConfig`."""
    del variant
    return Vim(dim, self, config=config, rngs=rngs)


class Vim(nnx.Module):
  """Two branches of Mamba between shared projections."""

  def __init__(
    self,
    dim: int,
    mixer: SelectiveConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    inner, kwargs = mixer.expand * dim, {"dtype": config.dtype, "rngs": rngs}
    self.in_proj = uniform_linear(dim, 2 * inner, use_bias=False, **kwargs)

    def branch(*, has_dt_init):
      return MambaBranch(
        dim,
        inner,
        mixer.d_state,
        has_dt_init=has_dt_init,
        implementation=mixer.implementation,
        **kwargs,
      )

    self.branch = branch(has_dt_init=True)
    # The authors initialise only the forward branch's time steps.
    self.backward_branch = branch(has_dt_init=False)
    self.out_proj = mamba_out_proj(inner, dim, config=config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    v, z = halves(self.in_proj, x)
    # Not by `mix`, which would reverse the tokens twice more.
    forward = self.branch(RASTER.tokens(v)).reshape(v.shape)
    backward = self.backward_branch(REVERSED_RASTER.tokens(v))
    y = forward + REVERSED_RASTER.image(backward, *v.shape[1:3])
    return scaled(self.out_proj(y / 2 * jax.nn.silu(z)), branch_scale)

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Operands]:
    """Returns the inputs of both SSMs, [B, H, W, 2 D], and what they select."""
    return self._select(halves(self.in_proj, x)[0])

  def mix(
    self, values: Float[Array, "B H W E"], operands: Operands
  ) -> Float[Array, "B H W E"]:
    """Scans the first half of the channels forwards, the others backwards."""
    forward, backward = jnp.split(values, 2, axis=-1)
    tokens = RASTER.tokens(forward), REVERSED_RASTER.tokens(backward)
    branches = self.branch, self.backward_branch
    images = [
      path.image(branch.ssm.scan(u, selected), *values.shape[1:3])
      for path, branch, u, selected in zip(
        (RASTER, REVERSED_RASTER), branches, tokens, operands, strict=True
      )
    ]
    return jnp.concatenate(images, axis=-1)

  def _select(self, v):
    forward = self.branch.select(RASTER.tokens(v))
    backward = self.backward_branch.select(REVERSED_RASTER.tokens(v))
    size = v.shape[1:3]
    images = (
      RASTER.image(forward[0], *size),
      REVERSED_RASTER.image(backward[0], *size),
    )
    return jnp.concatenate(images, axis=-1), (forward[1], backward[1])
