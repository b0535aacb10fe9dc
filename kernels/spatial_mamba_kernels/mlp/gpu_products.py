"""What the MLP's GPU kernels share: products by Hopper's tensor cores.

All values are in the layout of a product's result: of 64 rows, a warp has 16.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.mlp.plans import EXCHANGED as EXCHANGED
from spatial_mamba_kernels.mlp.plans import TOKENS as TOKENS
from spatial_mamba_kernels.mlp.plans import WARPGROUPS as WARPGROUPS
from spatial_mamba_kernels.typing import Array


def flat_tokens(x: Array) -> Array:
  """Returns x as [T, C], padded to whole programs."""
  return gpu.flat_tokens(x, WARPGROUPS * TOKENS)


def token_scales(branch_scale: Array, x: Array) -> Array:
  """Returns [B] as [T], padded like `flat_tokens`."""
  return gpu.token_scales(branch_scale, x, WARPGROUPS * TOKENS)


def tiles(width: int, *shape: int) -> Any:
  """Returns shared memory for bfloat16 matrices, tiled for tensor cores.

  A tile has rows of `width`, swizzled so that banks are read evenly.
  """
  layout = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=layout)


def compiler_params() -> Any:
  """Returns parameters for `plgpu.kernel`."""
  return plgpu.CompilerParams(
    approx_math=True,
    # Pallas has one scratch for all warpgroups, where they would race.
    reduction_scratch_bytes=0,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
  )


def product(a: Any, b: Any) -> Array:
  """Returns the product of two matrices in shared memory."""

  def multiply(total):
    plgpu.wgmma(total, a, b)
    return total[...]

  return pl.run_scoped(
    multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]))
  )


def add_product(total: Any, a: Array, b: Any) -> None:
  """Starts to add to `total` the product with a matrix in shared memory."""
  plgpu.wgmma(total, a, b)


def sum_rows(values: Array, exchanged: Any) -> Array:
  """Returns the sums over rows; `exchanged` is a reference to scratch."""

  def reduce(_, values, exchanged):
    return values.reduce("add", 0, exchanged)

  result = plgpu.ShapeDtypeStruct(
    values.shape[1:], values.dtype, plgpu.Layout.WGMMA.reduce(0)
  )
  inlined: Any = plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result
  )
  return inlined(reduce)(values, exchanged)


def scaled(values: Array, scale: Array, axis: int = 0) -> Array:
  """Returns values times scale; zero for a scale of zero, whatever the value.

  Args:
    values: a matrix.
    scale: one value a token.
    axis: the matrix's axis of tokens.
  """
  scale = lax.broadcast_in_dim(scale, values.shape, (axis,))
  return jnp.where(scale > 0, values * scale, 0)


def store(tile: Any, values: Array) -> None:
  """Stores into shared memory, for copies and tensor cores to read."""
  tile[...] = values.astype(tile.dtype)
  plgpu.commit_smem()
