"""Mamba (arXiv 2312.00752) over the raster of an image.

It computes what `Mamba` of github.com/hustvl/Vim, commit dd0358a, computes with
`bimamba_type="none"`. As in all code of Mamba, B is discretised by Euler's
rule; the paper has zero-order hold.

Axis letters: B batch, H and W height and width, L = H * W tokens, C channels, D
inner channels.
"""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import jax
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models import initializers
from spatial_mamba_jax.models.layers import (
  halves,
  linear,
  scaled,
  uniform_linear,
)
from spatial_mamba_jax.models.mixers.scans import RASTER
from spatial_mamba_jax.models.mixers.selective import (
  MambaBranch,
  SelectiveConfig,
)

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MambaConfig(SelectiveConfig):
  """One causal scan over the raster; see `SelectiveConfig`."""

  name: ClassVar[str] = "mamba"

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "Mamba":
    """Creates the mixer of a block; see `MixerConfig`."""
    del variant
    return Mamba(dim, self, config=config, rngs=rngs)


class Mamba(nnx.Module):
  """Mamba's block (figure 3 of the paper), without norm and residual."""

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
    self.branch = MambaBranch(
      dim,
      inner,
      mixer.d_state,
      implementation=mixer.implementation,
      **kwargs,
    )
    self.out_proj = mamba_out_proj(inner, dim, config=config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    v, z = halves(self.in_proj, x)
    y = self.mix(*self._select(v))
    return scaled(self.out_proj(y * jax.nn.silu(z)), branch_scale)

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """Returns the SSM's input, and what its tokens select."""
    return self._select(halves(self.in_proj, x)[0])

  def mix(
    self, values: Float[Array, "B H W D"], operands: Float[Array, "B L P"]
  ) -> Float[Array, "B H W D"]:
    """Scans the tokens row by row."""
    y = self.branch.ssm.scan(RASTER.tokens(values), operands)
    return y.reshape(values.shape)

  def _select(self, v):
    u, selected = self.branch.select(RASTER.tokens(v))
    return u.reshape(v.shape), selected


def mamba_out_proj(
  inner: int, dim: int, *, config: "ModelConfig", rngs: nnx.Rngs
) -> nnx.Linear:
  """Creates the last projection, initially scaled by the network's depth.

  It is PyTorch's default, divided by the square root of the number of blocks.
  """
  return linear(
    inner,
    dim,
    use_bias=False,
    kernel_init=initializers.fan_in_uniform(inner * sum(config.depths)),
    dtype=config.dtype,
    rngs=rngs,
  )
