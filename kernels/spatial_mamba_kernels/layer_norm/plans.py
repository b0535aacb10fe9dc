"""The normalisations' kernels: dimensions, and what each can serve."""

import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Dimensions, Kernel
from spatial_mamba_kernels.gpu import plan as gpu
from spatial_mamba_kernels.sharding import BATCH, WHOLE

# Channels at most: with more, a thread's registers would not hold all images.
MOST_CHANNELS = 1024

_IMAGE = (BATCH, WHOLE, WHOLE, WHOLE)
_WEIGHTS = (WHOLE,)
_SUMS = ((BATCH, WHOLE),) * 2

DIMENSIONS = Dimensions(
  arguments=(_IMAGE, _WEIGHTS, _WEIGHTS), result=(_IMAGE, _IMAGE), saved=()
)
GATED_DIMENSIONS = Dimensions(
  arguments=(_IMAGE, _WEIGHTS, _WEIGHTS, _IMAGE, (BATCH,)),
  result=_IMAGE,
  saved=(),
)


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernels cannot serve."""
  gpu.check_served(arrays[:4])
  channels = arrays[0].shape[-1]
  if channels % gpu.LANES or channels > MOST_CHANNELS:
    raise NotImplementedError(
      f"mosaic_gpu normalises {gpu.LANES} channels or a multiple, up to"
      f" {MOST_CHANNELS}, not {channels}"
    )


def _finish(arrays, sums):
  del arrays
  dx, *sums = sums
  return dx, *(jnp.sum(x, axis=0) for x in sums)


def _finish_gated(arrays, sums):
  dx, dgate, *sums = sums
  dscale, dbias = (jnp.sum(x, axis=0) for x in sums)
  return dx, dscale, dbias, dgate, jnp.zeros_like(arrays[-1])


_MODULE = "spatial_mamba_kernels.layer_norm.mosaic_gpu"
KERNELS = {
  "mosaic_gpu": Kernel(
    plan, _MODULE, _finish, (_IMAGE, *_SUMS), {"is_gated": False}
  )
}
GATED_KERNELS = {
  "mosaic_gpu": Kernel(
    plan,
    _MODULE,
    _finish_gated,
    (_IMAGE, _IMAGE, *_SUMS),
    {"is_gated": True},
  )
}
