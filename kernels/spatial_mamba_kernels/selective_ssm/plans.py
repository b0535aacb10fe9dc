"""The SSM's kernels: dimensions, what each can serve, and its module."""

from spatial_mamba_kernels.dispatch import Dimensions, Kernel
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE

TOKENS = (BATCH, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE)

DIMENSIONS = Dimensions(
  arguments=(
    TOKENS,
    TOKENS,
    (CHANNELS, WHOLE),
    NUMBERS,
    NUMBERS,
    (CHANNELS,),
    (CHANNELS,),
  ),
  result=TOKENS,
  saved=((WHOLE, WHOLE, BATCH, CHANNELS),),
)

# Of a segment, the backward pass recomputes all states of all tokens: as many
# of them as an SM's shared memory has room for, for 128 channels.
_STATES_OF_SEGMENT = 256
_LONGEST_SEGMENT = 128


def segment(states: int) -> int:
  """Returns after how many tokens the kernels save the state."""
  return max(1, min(_STATES_OF_SEGMENT // states, _LONGEST_SEGMENT))


KERNELS: dict[str, Kernel] = {}
