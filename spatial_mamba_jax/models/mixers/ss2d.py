"""SS2D, the cross scan of VMamba (arXiv 2401.10166).

It computes what `SS2D` of github.com/MzeroMiko/VMamba, commit 2ed52ea,
computes. The default is `forward_type="v05_noz"`, as in the newest models. With
`gate=True` and `conv_bias=True` it is `forward_type="v0"`, as in the first
models and the paper.

Axis letters: B batch, H and W height and width, L = H * W tokens, C channels, D
inner channels.
"""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.fields import number
from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  halves,
  linear,
  scaled,
)
from spatial_mamba_jax.models.mixers.base import MAX_EXPANSION, MAX_STATES
from spatial_mamba_jax.models.mixers.scans import COLUMNS, RASTER
from spatial_mamba_jax.models.mixers.selective import (
  SelectiveConfig,
  SelectiveSSM,
)
from spatial_mamba_jax.models.norms import LayerNorm

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# Scan k runs along the first path, scan k + 2 along it from its end.
PATHS = RASTER, COLUMNS


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class SS2DConfig(SelectiveConfig):
  """Scans of rows and columns in both directions; see `SelectiveConfig`.

  Attributes:
    d_state: 1 in the newest models, 16 in the first ones.
    expand: 1 in the newest models, 2 in the first ones.
    gate: whether the SiLU of a second projection of the input multiplies the
      normalised output, as in the first models.
    conv_bias: whether the convolution has a bias, as in the first models.
  """

  name: ClassVar[str] = "ss2d"

  d_state: int = number(1, least=1, most=MAX_STATES)
  expand: int = number(1, least=1, most=MAX_EXPANSION)
  gate: bool = False
  conv_bias: bool = False

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "SS2D":
    """Creates the mixer of a block; see `MixerConfig`."""
    del variant
    return SS2D(dim, self, config=config, rngs=rngs)


class SS2D(nnx.Module):
  """Convolution, four selective scans, their sum and its LayerNorm."""

  def __init__(
    self,
    dim: int,
    mixer: SS2DConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    inner, kwargs = mixer.expand * dim, {"dtype": config.dtype, "rngs": rngs}
    rest = {"implementation": config.layer_implementation, **kwargs}
    width = 2 * inner if mixer.gate else inner
    self.in_proj = linear(dim, width, use_bias=False, **kwargs)
    self.conv = DepthwiseConv(inner, use_bias=mixer.conv_bias, **rest)
    self.ssm = SelectiveSSM(
      dim,
      inner,
      mixer.d_state,
      scans=2 * len(PATHS),
      implementation=mixer.implementation,
      **kwargs,
    )
    self.norm = LayerNorm(inner, **rest)
    self.out_proj = linear(inner, dim, use_bias=False, **kwargs)
    self.has_gate = mixer.gate

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    v, *z = self._project(x)
    y = self.mix(*self._select(v))
    if self.has_gate:
      return self.out_proj(self.norm.gated(y, z[0], branch_scale))
    return scaled(self.out_proj(self.norm(y)), branch_scale)

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """Returns the SSMs' input, and what it selects for all scans."""
    return self._select(self._project(x)[0])

  def mix(
    self, values: Float[Array, "B H W D"], operands: Float[Array, "B H W P"]
  ) -> Float[Array, "B H W D"]:
    """Sums the outputs of the four scans of each pixel."""
    selected = self.ssm.split(operands)
    y = jnp.zeros_like(values)
    for index, path in enumerate(PATHS):
      scans = index, index + len(PATHS)
      forward, backward = self.ssm.both_ways(
        path, values, [selected[scan] for scan in scans], scans
      )
      y = y + path.image(forward + backward, *values.shape[1:3])
    return y

  def _project(self, x):
    return halves(self.in_proj, x) if self.has_gate else [self.in_proj(x)]

  def _select(self, v):
    return self.conv.silu(v, self.ssm.projection)
