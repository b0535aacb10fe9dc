"""Which dimensions of the operator's arrays are images, and which channels."""

from spatial_mamba_kernels.by_platform import Dimensions
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
NUMBERS = (BATCH, WHOLE, WHOLE, WHOLE)

DIMENSIONS = Dimensions(
  arguments=(
    IMAGE,
    IMAGE,
    (CHANNELS, WHOLE),
    NUMBERS,
    NUMBERS,
    (CHANNELS,),
    (WHOLE, WHOLE, WHOLE, CHANNELS),
    (WHOLE,),
    (CHANNELS,),
  ),
  result=IMAGE,
  saved=((WHOLE, WHOLE, BATCH, CHANNELS),),
)
