"""V2M (arXiv 2410.10382): two causal scans, one along each axis of an image.

It computes what `Mamba` of github.com/wangck20/V2M, commit 3d30905, computes
with `bimamba_type="2d"` and `if_devide_out=True`. The code departs from the
paper:

- The paper's recurrence takes each state from both neighbours. The code scans
  along one axis, multiplies by the gate, convolves, applies SiLU, and scans
  along the other axis.
- The output is transposed with respect to the input, and two of the four planes
  are mirrored with respect to the others. The code therefore takes square
  images alone. `V2MConfig.aligned` puts every output at its own pixel instead.
- The scans begin at the top left twice, at the top right and at the bottom
  left. The paper begins at each corner.

Axis letters: B batch, H and W height and width, C channels, D inner channels.
"""

import dataclasses
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.layers import halves, scaled, uniform_linear
from spatial_mamba_jax.models.mixers.mamba import mamba_out_proj
from spatial_mamba_jax.models.mixers.selective import (
  MambaBranch,
  SelectiveConfig,
)

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class V2MConfig(SelectiveConfig):
  """Scans along rows, then along columns; see `SelectiveConfig`.

  Attributes:
    aligned: whether every output is put at its own pixel. Otherwise the output
      is that of the authors' code, and images must be square.
  """

  name: ClassVar[str] = "v2m"

  aligned: bool = False

  @property
  def is_square(self) -> bool:
    """Whether the mixer takes square images alone."""
    return not self.aligned

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "V2M":
    """Creates the mixer of a block; see `MixerConfig`."""
    del variant
    return V2M(dim, self, config=config, rngs=rngs)


class V2M(nnx.Module):
  """Four planes, an image turned and mirrored, of two scans each.

  It has no `mix`: a SiLU between its two scans makes the output nonlinear in
  every choice of values.
  """

  def __init__(
    self,
    dim: int,
    mixer: V2MConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    inner, kwargs = mixer.expand * dim, {"dtype": config.dtype, "rngs": rngs}
    self.in_proj = uniform_linear(dim, 2 * inner, use_bias=False, **kwargs)

    def branch(selects, *, has_dt_init):
      return MambaBranch(
        dim,
        inner,
        mixer.d_state,
        selects=selects,
        has_dt_init=has_dt_init,
        implementation=mixer.implementation,
        **kwargs,
      )

    self.first = branch("B", has_dt_init=True)
    # The authors initialise only the first scan's time steps.
    self.second = branch("C", has_dt_init=False)
    self.out_proj = mamba_out_proj(inner, dim, config=config, rngs=rngs)
    self.is_aligned = mixer.aligned

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`).

    Raises:
      UserError: the image is not square, and the outputs are not aligned.
    """
    _, height, width, _ = x.shape
    if height != width and not self.is_aligned:
      raise UserError(
        "v2m needs as many rows as columns of tokens in each stage, got"
        f" {height} x {width}: mixer.aligned=True takes any image"
      )
    v, z = halves(self.in_proj, x)
    gate = jax.nn.silu(z)
    transposed_gate = _transposed(gate)
    columns = self._planes(v, gate, transposed_gate)
    rows = self._planes(_transposed(v), transposed_gate, gate)
    if self.is_aligned:
      y = _transposed(columns) + rows
    else:
      y = columns + _transposed(rows)
    return scaled(self.out_proj(y / 2), branch_scale)

  def _planes(self, v, gate, transposed_gate):
    """Scans along the second axis, then along the first one.

    Args:
      v: [B, H, W, D], or transposed. It is scanned as it is, and with its
        second axis mirrored.
      gate: the gate as `v` lies.
      transposed_gate: the same, transposed.

    Returns:
      The sum of both, [B, W, H, D], or transposed.
    """
    total = jnp.zeros_like(transposed_gate)
    for is_mirrored in (False, True):
      mirrored = partial(jnp.flip, axis=2) if is_mirrored else lambda x: x
      y = mirrored(_along_second(self.first, mirrored(v))) * gate
      y = _along_second(self.second, _transposed(y)) * transposed_gate
      if is_mirrored and not self.is_aligned:
        y = jnp.flip(y, axis=2)
      total = total + y
    return total


def _along_second(
  branch: MambaBranch, image: Float[Array, "B H W D"]
) -> Float[Array, "B H W D"]:
  """Scans each row of an image by itself."""
  batch, height, width, channels = image.shape
  tokens = image.reshape(batch * height, width, channels)
  return branch(tokens).reshape(image.shape)


def _transposed(image: Float[Array, "B H W D"]) -> Float[Array, "B W H D"]:
  return jnp.swapaxes(image, 1, 2)
