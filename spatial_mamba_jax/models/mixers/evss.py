"""The mixer of EVSSM (arXiv 2405.14343): one scan, turned from block to block.

It computes what `SS2D` of github.com/kkkls/EVSSM, commit 5098a52, computes,
which is one scan of the raster. The authors turn the image before each block:
they transpose it before even blocks, and rotate it by 180 degrees before odd
ones. Their network never turns it back. The mixer here applies all turns up to
its block, and then undoes them, so the other layers see the image as it is.

Axis letters: B batch, H and W height and width, L = H * W tokens, C channels, D
inner channels.
"""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  SequenceConv,
  halves,
  scaled,
  uniform_linear,
)
from spatial_mamba_jax.models.mixers.base import Place
from spatial_mamba_jax.models.mixers.scans import RASTER
from spatial_mamba_jax.models.mixers.selective import (
  SelectiveConfig,
  SelectiveSSM,
)
from spatial_mamba_jax.models.norms import LayerNorm

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# The turns of blocks 0 to 3, after which they repeat: whether the image is
# transposed, and whether it is rotated by 180 degrees.
TURNS = ((True, False), (True, True), (False, True), (False, False))
# Taps of the convolution of what the tokens select.
_SELECTED_CONV = 7


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class EVSSConfig(SelectiveConfig):
  """One scan of the turned image; see `SelectiveConfig`."""

  name: ClassVar[str] = "evss"

  def variant(self, place: Place) -> Hashable:
    """Returns how the image is turned: one of `TURNS`."""
    return TURNS[place.index % len(TURNS)]

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "EVSS":
    """Creates the mixer of a block; see `MixerConfig`."""
    return EVSS(dim, self, variant, config=config, rngs=rngs)


class EVSS(nnx.Module):
  """Convolution, selective SSM, LayerNorm and a gate, with exact GELUs."""

  def __init__(
    self,
    dim: int,
    mixer: EVSSConfig,
    turn: Any,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    inner, kwargs = mixer.expand * dim, {"dtype": config.dtype, "rngs": rngs}
    rest = {"implementation": config.layer_implementation, **kwargs}
    self.turn = turn
    self.in_proj = uniform_linear(dim, 2 * inner, use_bias=False, **kwargs)
    self.conv = DepthwiseConv(inner, **rest)
    self.ssm = SelectiveSSM(
      dim,
      inner,
      mixer.d_state,
      scans=1,
      implementation=mixer.implementation,
      **kwargs,
    )
    selected = self.ssm.projection.shape[1]
    self.selected_conv = SequenceConv(selected, _SELECTED_CONV, **kwargs)
    self.norm = LayerNorm(inner, **rest)
    self.out_proj = uniform_linear(inner, dim, use_bias=False, **kwargs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    v, z = halves(self.in_proj, x)
    y = self._scan(*self._select(self._turned(v)))
    y = self.norm(self._turned_back(y))
    y = self.out_proj(y * jax.nn.gelu(z, approximate=False))
    return scaled(y, branch_scale)

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """Returns the SSM's input, and what it selects in the turned image."""
    v, _ = halves(self.in_proj, x)
    u, selected = self._select(self._turned(v))
    return self._turned_back(u), selected

  def mix(
    self, values: Float[Array, "B H W D"], operands: Float[Array, "B L P"]
  ) -> Float[Array, "B H W D"]:
    """Scans the rows of the turned image."""
    return self._turned_back(self._scan(self._turned(values), operands))

  def _scan(self, u, selected):
    return self.ssm.scan(RASTER.tokens(u), selected).reshape(u.shape)

  def _select(self, v):
    u = jax.nn.gelu(self.conv(v), approximate=False)
    # Over the ends of rows too, as in the authors' code.
    selected = self.selected_conv(self.ssm.project(RASTER.tokens(u)))
    return u, selected

  def _turned(self, image):
    is_transposed, is_rotated = self.turn
    x = jnp.swapaxes(image, 1, 2) if is_transposed else image
    return jnp.flip(x, (1, 2)) if is_rotated else x

  def _turned_back(self, image):
    # A rotation by 180 degrees and a transposition commute.
    return self._turned(image)
