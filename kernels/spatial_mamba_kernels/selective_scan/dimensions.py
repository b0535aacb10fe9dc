"""Which dimensions of the scan's arrays are images, and which channels."""

from spatial_mamba_kernels.by_platform import Dimensions
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE

TOKENS = (BATCH, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE)
STATES = (BATCH, WHOLE, WHOLE, CHANNELS)

DIMENSIONS = Dimensions(
  arguments=(TOKENS, TOKENS, (CHANNELS, WHOLE), NUMBERS, (CHANNELS,)),
  result=STATES,
  saved=(STATES,),
)
