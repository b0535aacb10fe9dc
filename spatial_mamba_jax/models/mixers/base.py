"""The interface of a token mixer.

Axis letters: B batch, H and W height and width, C channels, D inner channels.
"""

import abc
import dataclasses
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.fields import Section

if TYPE_CHECKING:
  from spatial_mamba_jax.models.config import ModelConfig

# Most states a channel: four times Mamba-2's (arXiv 2405.21060).
MAX_STATES = 2**10
# Greatest ratio of inner to outer channels, in the mixer and in the MLP;
# networks have 1 to 8.
MAX_EXPANSION = 2**6


@dataclasses.dataclass(frozen=True)
class Place:
  """A block's position in a network. All indices count from 0.

  Attributes:
    stage: index of the block's stage.
    block: index of the block in its stage.
    index: index of the block in the whole network.
  """

  stage: int
  block: int
  index: int


# Hashable, because a model holds it as a static attribute; not frozen, because
# flags set its fields.
@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MixerConfig(Section, abc.ABC):
  """The config of a token mixer.

  Attributes:
    name: identifies the kind of mixer in saved configs.
    needs_size: whether a program computes with the height and width of images,
      so that no program is for all sizes.
  """

  name: ClassVar[str]
  needs_size: ClassVar[bool] = False

  @property
  def is_square(self) -> bool:
    """Whether the mixer takes square images alone."""
    return False

  def variant(self, place: Place) -> Hashable:
    """Returns the part of the static structure that depends on the place.

    Blocks of one stage with equal variants have the same structure: they are
    traced once, and their weights can be stacked. By default all are equal.
    """
    del place
    return None

  @abc.abstractmethod
  def create(
    self, dim: int, variant: Hashable, *, config: "ModelConfig", rngs: nnx.Rngs
  ) -> "Mixer":
    """Creates the mixer of a block.

    Args:
      dim: C, channels of the block.
      variant: the result of `variant` for the block's place.
      config: the network's config.
      rngs: random streams; `params` initialises the weights.
    """


@runtime_checkable
class Mixer(Protocol):
  """A token mixer, an `nnx.Module`: the first residual branch of a block."""

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the branch, times `branch_scale` (see `drop_path_scales`)."""
    ...


@runtime_checkable
class LinearMixer(Mixer, Protocol):
  """A mixer with a mixing matrix, which the image controls.

  It computes `mix(*select(x))`, then operations on each token alone.
  """

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Any]:
    """Returns the values [B, H, W, D] to mix, and the operands of `mix`."""
    ...

  def mix(self, values: Array, operands: Any) -> Float[Array, "B H W D"]:
    """Mixes values between tokens.

    The result is linear in `values`, but for a constant; its Jacobian is the
    mixing matrix. It may have several outputs for each channel of the values,
    one after the other along the channels.
    """
    ...
