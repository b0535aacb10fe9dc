"""The token mixer of Spatial-Mamba."""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.fields import choice, number
from spatial_mamba_jax.models.initializers import constant
from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  halves,
  linear,
  uniform_linear,
)
from spatial_mamba_jax.models.mixers.base import (
  MAX_EXPANSION,
  MAX_STATES,
  MixerConfig,
)
from spatial_mamba_jax.models.mixers.selective import (
  dt_bias,
  dt_rank,
  log_rates,
)
from spatial_mamba_jax.models.norms import LayerNorm

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# (delta, A, B, C): time steps before bias and softplus [B, H, W, D], diagonal
# state matrices [D, N], input and output projections [B, H, W, N]. A plain
# tuple, because `nnx.tabulate` fails on a NamedTuple.
Operands = tuple[Array, Array, Array, Array]


class States(NamedTuple):
  """The states of one block, for each of its tokens.

  Attributes:
    before: [B, H, W, D, N], after the scan and before the fusion.
    after: [B, H, W, D, N], after the fusion with neighbouring states.
  """

  before: Float[Array, "B H W D N"]
  after: Float[Array, "B H W D N"]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class StructureAwareConfig(MixerConfig):
  """The structure-aware SSM (section 3 of arXiv 2410.15091).

  Attributes:
    d_state: N, states a channel; the authors' models have 1.
    expand: inner channels, divided by the stage's channels.
    implementation: implementation of scan and fusion, None for the platform's
      best; see `spatial_mamba_kernels`.
  """

  name: ClassVar[str] = "spatial_mamba"

  d_state: int = number(1, least=1, most=MAX_STATES)
  expand: int = number(2, least=1, most=MAX_EXPANSION)
  implementation: str | None = choice(None, among=smk.IMPLEMENTATIONS)

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "StructureAwareSSM":
    """Creates the mixer of a block; see `MixerConfig`."""
    del variant
    return StructureAwareSSM(dim, self, config=config, rngs=rngs)


class StateFusion(nnx.Module):
  """The parameters of the state fusion, initially ones as the authors'."""

  def __init__(self, features: int, *, dtype: DTypeLike):
    self.kernels = nnx.Param(constant(1, (3, 3, 3, features), dtype))
    self.alpha = nnx.Param(constant(1, 3, dtype))


class StructureAwareSSM(nnx.Module):
  """Gated structure-aware SSM (figure 3 of the paper).

  The input is projected to x and a gate z. x passes a depthwise convolution,
  and is projected to the SSM's time steps, B and C. The SSM's output is
  normalised, gated by z and projected back.
  """

  def __init__(
    self,
    dim: int,
    mixer: StructureAwareConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    inner, rank, n = mixer.expand * dim, dt_rank(dim), mixer.d_state
    dtype, param_dtype = config.dtype, config.param_dtype
    kwargs = {"dtype": dtype, "rngs": rngs}
    self.in_proj = linear(dim, 2 * inner, use_bias=False, **kwargs)
    rest = {"implementation": config.layer_implementation, **kwargs}
    self.conv = DepthwiseConv(inner, **rest)
    self.x_proj = uniform_linear(inner, rank + 2 * n, use_bias=False, **kwargs)
    self.dt_proj = uniform_linear(rank, inner, use_bias=False, **kwargs)
    self.dt_bias = nnx.Param(dt_bias(rngs.params(), (inner,), param_dtype))
    self.A_log = nnx.Param(log_rates(inner, n, param_dtype))
    self.D = nnx.Param(constant(1, inner, param_dtype))
    self.fusion = StateFusion(inner, dtype=param_dtype)
    self.norm = LayerNorm(inner, **rest)
    self.out_proj = linear(inner, dim, use_bias=False, **kwargs)
    self.splits = (rank, rank + n)
    self.implementation = mixer.implementation

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    x, z = halves(self.in_proj, x)
    y = self.mix(*self._select(x))
    return smk.keep(self.out_proj(self.norm.gated(y, z, branch_scale)))

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Operands]:
    """Returns the SSM's input u, and its operands, computed from the tokens."""
    return self._select(halves(self.in_proj, x)[0])

  def mix(
    self, values: Float[Array, "B H W D"], operands: Operands
  ) -> Float[Array, "B H W D"]:
    """Scans, fuses and observes (equations 2 to 4 of the paper)."""
    return smk.structure_aware_ssm(
      values,
      *operands,
      self.D[...],
      self.fusion.kernels[...],
      self.fusion.alpha[...],
      delta_bias=self.dt_bias[...],
      implementation=self.implementation,
    )

  def states(self, x: Float[Array, "B H W C"]) -> States:
    """Returns the states in `self(x)`, computed by separate operators."""
    u, (delta, A, B, _) = self.select(x)
    batch, height, width, _ = u.shape

    def tokens(x):
      return x.reshape(batch, height * width, -1)

    before = smk.selective_scan(
      tokens(u),
      tokens(delta),
      A,
      tokens(B),
      delta_bias=self.dt_bias[...],
      implementation=self.implementation,
    ).reshape(batch, height, width, *A.shape)
    images = jnp.moveaxis(before, -1, 0)
    after = smk.state_fusion(
      images.reshape(-1, *images.shape[2:]),
      self.fusion.kernels[...],
      self.fusion.alpha[...],
      implementation=self.implementation,
    ).reshape(images.shape)
    return States(before, jnp.moveaxis(after, 0, -1))

  def _select(self, x):
    u, projected = self.conv.silu(x, self.x_proj.kernel[...])
    dt_low, B, C = jnp.split(smk.keep(projected), self.splits, axis=-1)
    return u, (self.dt_proj(dt_low), -jnp.exp(self.A_log[...]), B, C)
