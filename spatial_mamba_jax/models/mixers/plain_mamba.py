"""PlainMamba (arXiv 2403.17695): four snakes over an image.

It computes what `PlainMamba2D` of github.com/ChenhongyiYang/PlainMamba, commit
0975a1d, computes, which departs from the paper twice:

- Each scan visits the inputs u along its snake, but takes the time steps, B and
  C in the order of the raster. Step t has those of the t-th token of the
  raster, not those of the token that it visits.
- The bias of the time steps counts twice.

Axis letters: B batch, H and W height and width, L = H * W tokens, C channels, D
inner channels, N states.
"""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.initializers import normal
from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  halves,
  scaled,
  uniform_linear,
)
from spatial_mamba_jax.models.mixers.scans import (
  COLUMN_SNAKE,
  RASTER,
  ROW_SNAKE,
  Path,
)
from spatial_mamba_jax.models.mixers.selective import (
  SelectiveConfig,
  SelectiveSSM,
)

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# Each is scanned in both directions.
PATHS = ROW_SNAKE, COLUMN_SNAKE
# Rows and columns of the kernel of the convolution.
_CONV = 7
# What leads to a token, by index: nothing, or a move.
_MOVES = ((0, 0), (0, 1), (0, -1), (-1, 0), (1, 0))


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PlainMambaConfig(SelectiveConfig):
  """Four snakes with the direction of each step; see `SelectiveConfig`."""

  name: ClassVar[str] = "plain_mamba"
  needs_size: ClassVar[bool] = True

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "PlainMamba":
    """Creates the mixer of a block; see `MixerConfig`."""
    del variant
    return PlainMamba(dim, self, config=config, rngs=rngs)


class PlainMamba(nnx.Module):
  """Convolution and one selective SSM along four paths, gated.

  Attributes:
    direction_B: [5, N], added to B at a step: by index 0 for the first step,
      then for a move right, left, up and down.
  """

  def __init__(
    self,
    dim: int,
    mixer: PlainMambaConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    inner, kwargs = mixer.expand * dim, {"dtype": config.dtype, "rngs": rngs}
    self.in_proj = uniform_linear(dim, 2 * inner, **kwargs)
    self.conv = DepthwiseConv(
      inner, size=_CONV, implementation=config.layer_implementation, **kwargs
    )
    self.ssm = SelectiveSSM(
      dim,
      inner,
      mixer.d_state,
      implementation=mixer.implementation,
      **kwargs,
    )
    shape = (len(_MOVES), mixer.d_state)
    init = normal(0.02)
    self.direction_B = nnx.Param(init(rngs.params(), shape, config.param_dtype))
    self.out_proj = uniform_linear(inner, dim, **kwargs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    v, z = halves(self.in_proj, x)
    y = self.mix(*self._select(v)) * jax.nn.silu(z)
    return scaled(self.out_proj(y), branch_scale)

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """Returns the SSM's input, and what each token of the raster selects."""
    return self._select(halves(self.in_proj, x)[0])

  def mix(
    self, values: Float[Array, "B H W D"], operands: Float[Array, "B L P"]
  ) -> Float[Array, "B H W D"]:
    """Sums the outputs of the four scans of each pixel."""
    size = values.shape[1:3]
    delta, B, C = self.ssm.operands(operands)

    def scan(path, tokens):
      directions = self.direction_B[...][moves(path, *size)].astype(B.dtype)
      return self.ssm.run(
        tokens, delta, B + with_rank_of(B, directions), C, bias_factor=2
      )

    y = jnp.zeros_like(values)
    for path in PATHS:
      tokens = path.tokens(values)
      backward = scan(path.reversed(), jnp.flip(tokens, 1))
      both = scan(path, tokens) + jnp.flip(backward, 1)
      y = y + path.image(both, *size)
    return y

  def _select(self, v):
    u = jax.nn.silu(self.conv(v))
    return u, RASTER.tokens(self.ssm.project(u))


def moves(path: Path, height: int, width: int) -> np.ndarray:
  """Returns the index of the move that leads to each token of a snake, [L]."""
  places = np.stack(np.divmod(path.steps(height, width), width), axis=-1)
  steps = np.diff(places, axis=0, prepend=places[:1])
  (indices, moves_of) = np.nonzero((steps[:, None] == _MOVES).all(-1))
  assert len(indices) == len(steps)
  return moves_of
