"""Which dimensions of the fusion's arrays are images, and which channels."""

from spatial_mamba_kernels.by_platform import Dimensions
from spatial_mamba_kernels.sharding import BATCH, CHANNELS, WHOLE

IMAGE = (BATCH, WHOLE, WHOLE, CHANNELS)
# Partial sums for the weights of a stencil.
WEIGHTS = (BATCH, WHOLE, CHANNELS)

DIMENSIONS = Dimensions(
  arguments=(IMAGE, (WHOLE, WHOLE, WHOLE, CHANNELS), (WHOLE,)),
  result=IMAGE,
  saved=(),
)
