"""The linear attention of MLLA (arXiv 2405.16605).

It computes what the mixer of `MLLABlock` of github.com/LeapLabTHU/MLLA, commit
66b6d29, computes. The authors' code takes square images alone and rounds the
rotation to float32; this one takes any image, and rotates in its dtype (float32
for bfloat16).

Axis letters: B batch, H and W height and width, C channels.
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from spatial_mamba_kernels.shapes import at_least_float32
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import number
from spatial_mamba_jax.models.layers import DepthwiseConv, linear, scaled
from spatial_mamba_jax.models.mixers.base import MixerConfig

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# Added to the denominators of the attention.
_EPSILON = 1e-6
# Largest period of the rotary position embedding is 2 pi times this.
_ROPE_BASE = 10_000
# Most channels of a head, as many as the widest stage has.
_MOST_CHANNELS = 2**14


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LinearAttentionConfig(MixerConfig):
  """Linear attention with rotary and local position embeddings.

  Attributes:
    head_dim: channels of a head. Where it does not divide the channels of a
      stage, a head has their greatest common divisor.
  """

  name: ClassVar[str] = "linear_attention"
  needs_size: ClassVar[bool] = True

  head_dim: int = number(32, least=1, most=_MOST_CHANNELS)

  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "LinearAttention":
    """Creates the mixer of a block; see `MixerConfig`.

    Raises:
      UserError: `dim` is not a multiple of 4.
    """
    del variant
    return LinearAttention(dim, self, config=config, rngs=rngs)


class LinearAttention(nnx.Module):
  """Attention whose cost is linear in the tokens, gated as Mamba is."""

  def __init__(
    self,
    dim: int,
    mixer: LinearAttentionConfig,
    *,
    config: "ModelConfig",
    rngs: nnx.Rngs,
  ):
    if dim % 4:
      raise UserError(
        f"linear attention needs stages of a multiple of 4 channels, not {dim}"
      )
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    rest = {"implementation": config.layer_implementation, **kwargs}
    self.in_proj = linear(dim, dim, **kwargs)
    self.act_proj = linear(dim, dim, **kwargs)
    self.conv = DepthwiseConv(dim, **rest)
    self.qk = linear(dim, 2 * dim, **kwargs)
    self.lepe = DepthwiseConv(dim, **rest)
    self.out_proj = linear(dim, dim, **kwargs)
    self.heads = dim // math.gcd(mixer.head_dim, dim)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    gate = jax.nn.silu(self.act_proj(x))
    y = self.mix(*self.select(x))
    return scaled(self.out_proj(y * gate), branch_scale)

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Array]:
    """Returns the values, and queries and keys in one array."""
    v = jax.nn.silu(self.conv(self.in_proj(x)))
    return v, jax.nn.elu(self.qk(v)) + 1

  def mix(
    self, values: Float[Array, "B H W C"], operands: Float[Array, "B H W 2*C"]
  ) -> Float[Array, "B H W C"]:
    """Attends to all tokens, and convolves (LePE)."""
    _, height, width, channels = values.shape
    q, k = jnp.split(operands, 2, axis=-1)
    rope = Rotation.of(height, width, channels, at_least_float32(values.dtype))
    # Before the sum over tokens, which would overflow in half precision.
    scale = (height * width) ** -0.5
    mean_k = jnp.mean(k, axis=(1, 2))
    norm = jnp.einsum("bhwnc,bnc->bhwn", self._split(q), self._split(mean_k))
    context = jnp.einsum(
      "bhwnc,bhwnd->bncd",
      self._split(scale * rope(k)),
      self._split(scale * values),
    )
    y = jnp.einsum("bhwnc,bncd->bhwnd", self._split(rope(q)), context)
    y = y / (norm + _EPSILON)[..., None]
    return y.reshape(values.shape) + self.lepe(values)

  def _split(self, x):
    """Splits the channels into heads."""
    return x.reshape(*x.shape[:-1], self.heads, -1)


class Rotation(NamedTuple):
  """The rotary position embedding (arXiv 2104.09864) of an image.

  It rotates pairs of channels. The angle is proportional to the row in the
  first half of the channels, and to the column in the second half.

  Attributes:
    cos: [H, W, C / 2].
    sin: [H, W, C / 2].
  """

  cos: Array
  sin: Array

  @classmethod
  def of(
    cls, height: int, width: int, channels: int, dtype: DTypeLike
  ) -> "Rotation":
    """Returns the rotation of images of a size."""
    count = channels // 4
    rates = _ROPE_BASE ** (-np.arange(count) / count)
    rows, columns = np.mgrid[:height, :width][..., None] * rates
    angles = np.concatenate((rows, columns), axis=-1)
    return cls(*(jnp.asarray(f(angles), dtype) for f in (np.cos, np.sin)))

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    pairs = x.astype(self.cos.dtype).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = self.cos[None], self.sin[None]
    turned = even * cos - odd * sin, even * sin + odd * cos
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)
