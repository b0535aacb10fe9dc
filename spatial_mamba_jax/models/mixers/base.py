"""What a block takes as its token mixer.

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


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a block stands in a network, all counted from 0.

  Attributes:
    stage: its stage.
    block: its index in the stage.
    index: its index in the whole network.
  """

  stage: int
  block: int
  index: int


# Hashable, because a model holds it as a static attribute; not frozen, because
# flags set its fields.
@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MixerConfig(Section, abc.ABC):
  """A kind of token mixer, and its settings.

  Attributes:
    name: of the kind, as a saved config has it.
  """

  name: ClassVar[str]

  def variant(self, place: Place) -> Hashable:
    """What of the mixer's static structure depends on its place.

    Blocks of one stage with equal variants are alike: they are traced once, and
    their weights can be stacked.
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
      variant: as `variant` gives it for the block's place.
      config: the network's.
      rngs: the stream `params`.
    """


@runtime_checkable
class Mixer(Protocol):
  """A token mixer, an `nnx.Module`: the first residual branch of a block.

  What it computes is `mix(*select(x))`, and after that whatever is done token
  by token.
  """

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    branch_scale: Float[Array, "B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """The branch of `x`, times `branch_scale` (see `drop_path_scales`)."""
    ...

  def select(self, x: Float[Array, "B H W C"]) -> tuple[Array, Any]:
    """The values [B, H, W, D] that are mixed, and the operands that say how."""
    ...

  def mix(self, values: Array, operands: Any) -> Float[Array, "B H W D"]:
    """Mixes values between tokens.

    It is linear in `values`: its Jacobian is the mixing matrix.
    """
    ...
