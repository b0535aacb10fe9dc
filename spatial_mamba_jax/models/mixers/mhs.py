"""The multi-head scan of MHS-VM (arXiv 2406.05992).

It computes what `VSSGate` of github.com/PixDeep/MHS-VM, commit be64b6f,
computes. The paper's threshold is to switch off values whose scans disagree
little. As the code defines it, the coefficient of variation of four numbers
lies in [2/3, 2] whatever they are, unless they agree to within about 1e-4: then
it tends to 0. So the authors' thresholds (0, 0.4 and 0.5) scale most values,
and switch off small ones. With a threshold above 0 a fresh narrow network has
no other values, and its scans have no gradients. The default is therefore 0.

Axis letters: B batch, H and W height and width, L = H * W tokens, C channels, E
channels of a head.
"""

import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.shapes import at_least_float32
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import number
from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  halves,
  linear,
  scaled,
)
from spatial_mamba_jax.models.mixers.scans import (
  COLUMN_SNAKE,
  COLUMNS,
  RASTER,
  ROW_SNAKE,
  Path,
)
from spatial_mamba_jax.models.mixers.selective import (
  SelectiveConfig,
  SelectiveSSM,
)
from spatial_mamba_jax.models.norms import LayerNorm

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# The two paths of each head, which it scans in both directions: snakes,
# diagonals, spirals, rasters.
PATHS = (
  (ROW_SNAKE, COLUMN_SNAKE),
  (Path("diagonals"), Path("diagonals", mirror="columns")),
  (Path("spiral"), Path("spiral", mirror="rows")),
  (RASTER, COLUMNS),
)
_SCANS = 4
# Added to the denominators of the coefficients of variation.
_EPSILON = 1e-5


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MHSConfig(SelectiveConfig):
  """Heads that scan in patterns of their own; see `SelectiveConfig`.

  Attributes:
    expand: always 1: the heads share the stage's channels.
    heads: how many of the patterns snake, diagonals, spiral and raster are
      used, in this order.
    threshold: subtracted from the coefficients of variation; negative
      differences count as 0.
    gate: whether a gate multiplies the output; without it there is no input
      projection.
  """

  name: ClassVar[str] = "mhs"
  needs_size: ClassVar[bool] = True

  expand: int = number(1, least=1, most=1)
  heads: int = number(4, least=1, most=len(PATHS))
  threshold: float = number(0.0, least=0, most=2)
  gate: bool = True

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "MHS":
    """Creates the mixer of a block; see `MixerConfig`.

    Raises:
      UserError: `dim` is not a multiple of `heads`.
    """
    del variant
    return MHS(dim, self, config=config, rngs=rngs)


class MHS(nnx.Module):
  """Convolution and heads of four selective scans, fused by their variation."""

  def __init__(
    self,
    dim: int,
    mixer: MHSConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    if dim % mixer.heads:
      raise UserError(
        f"mixer.heads={mixer.heads} must divide the channels of each stage, not"
        f" {dim}"
      )
    features, kwargs = dim // mixer.heads, {"dtype": config.dtype, "rngs": rngs}
    rest = {"implementation": config.layer_implementation, **kwargs}
    self.in_proj = (
      linear(dim, 2 * dim, use_bias=False, **kwargs) if mixer.gate else None
    )
    self.conv = DepthwiseConv(dim, **rest)
    self.head_proj = linear(dim, dim, use_bias=False, **kwargs)
    self.heads = nnx.List(
      [
        SelectiveSSM(
          features,
          features,
          mixer.d_state,
          scans=_SCANS,
          implementation=mixer.implementation,
          **kwargs,
        )
        for _ in range(mixer.heads)
      ]
    )
    self.cat_norm = LayerNorm(dim, **rest)
    self.y_proj = linear(dim, dim, use_bias=False, **kwargs)
    self.norm = LayerNorm(dim, **rest)
    self.threshold = mixer.threshold

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    v, *z = self._project(x)
    outputs = jnp.split(self.mix(*self._select(v)), _SCANS, axis=-1)
    fused = fuse(jnp.stack(outputs), self.threshold).astype(x.dtype)
    y = self.y_proj(self.cat_norm(fused))
    if self.in_proj is not None:
      return self.norm.gated(y, z[0], branch_scale)
    return scaled(self.norm(y), branch_scale)

  def select(
    self, x: Float[Array, "B H W C"]
  ) -> tuple[Array, list[list[Array]]]:
    """Returns the heads' inputs, and what each head selects for each scan."""
    return self._select(self._project(x)[0])

  def mix(
    self, values: Float[Array, "B H W C"], operands: list[list[Array]]
  ) -> Float[Array, "B H W 4*C"]:
    """Returns the outputs of the first scan of all heads, then the second's.

    A token's output is the sum of the four, times a factor of their variation.
    They differ little, so they are float32 in half precision too.
    """
    outputs: list[list[Array]] = [[] for _ in range(_SCANS)]
    values = values.astype(at_least_float32(values.dtype))
    inputs = jnp.split(values, len(self.heads), axis=-1)
    for head, u, selected, paths in zip(
      self.heads, inputs, operands, PATHS, strict=False
    ):
      for first, path in zip((0, 2), paths, strict=True):
        scans = first, first + 1
        chosen = [selected[scan] for scan in scans]
        ways = head.both_ways(path, u, chosen, scans)
        for scan, y in zip(scans, ways, strict=True):
          outputs[scan].append(path.image(y, *u.shape[1:3]))
    images = [image for of_scan in outputs for image in of_scan]
    return jnp.concatenate(images, axis=-1)

  def _project(self, x):
    return [x] if self.in_proj is None else halves(self.in_proj, x)

  def _select(self, v):
    values = self.head_proj(jax.nn.silu(self.conv(v)))
    inputs = jnp.split(values, len(self.heads), axis=-1)
    selected = [
      head.split(head.project(u))
      for head, u in zip(self.heads, inputs, strict=True)
    ]
    return values, selected


def fuse(
  outputs: Float[Array, "4 B H W C"], threshold: float
) -> Float[Array, "B H W C"]:
  """Sums outputs, times their coefficient of variation above a threshold."""
  centred = outputs - jnp.mean(outputs, axis=0, keepdims=True)
  variance = jnp.sum(centred**2, axis=0) / (len(outputs) - 1)
  # As in PyTorch, the derivative at 0 is 0.
  is_zero = variance == 0
  deviation = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, variance)))
  mean = jnp.mean(outputs - jnp.min(outputs, axis=0, keepdims=True), axis=0)
  variation = deviation / (mean + _EPSILON)
  return jnp.sum(outputs, axis=0) * jnp.maximum(variation - threshold, 0)
