"""What the GPU kernels share: a thread for each channel, 128 to a program.

A vector of 128 channels is spread over a warpgroup, one channel a thread. A
recurrence over tokens and a stencil over pixels then stay within a thread;
threads wait for each other only for copies and for sums over channels.

Since Hopper the tensor memory accelerator (TMA) copies tokens and rows through
shared memory, and leaves out what is beyond an array's end (but see `room`).
On older GPUs each thread copies its own channel: it loads what it needs next
into registers while it computes, and stores results to device memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu

from spatial_mamba_kernels.gpu.device import device
from spatial_mamba_kernels.gpu.plan import CHANNELS as CHANNELS
from spatial_mamba_kernels.gpu.plan import LANES as LANES
from spatial_mamba_kernels.gpu.plan import ROWS_SUMMED as ROWS_SUMMED
from spatial_mamba_kernels.gpu.plan import blocks as blocks
from spatial_mamba_kernels.gpu.plan import is_one_piece as is_one_piece
from spatial_mamba_kernels.gpu.plan import room as room
from spatial_mamba_kernels.gpu.plan import split as split
from spatial_mamba_kernels.typing import Array

# Versions of JAX differ in what it has.
plgpu: Any = mosaic_gpu


def pad_channels(x: Array) -> Array:
  """Pads channels as copies require.

  The TMA requires rows of a multiple of 16 bytes, threads whole blocks.
  """
  channels = x.shape[-1]
  if device().tma and channels % 8 == 0:
    return x
  return pad_to_blocks(x)


def pad_to_blocks(x: Array) -> Array:
  """Pads channels to whole blocks."""
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % CHANNELS)]
  return jnp.pad(x, padding)


def flat_tokens(x: Array, multiple: int) -> Array:
  """Returns [B, H, W, C] as [T, C], padded to a multiple of tokens."""
  flat = x.reshape(-1, x.shape[-1])
  return jnp.pad(flat, ((0, -len(flat) % multiple), (0, 0)))


def token_scales(scales: Array, x: Array, multiple: int) -> Array:
  """Returns [B] as [T], float32: each image's scale for all its tokens."""
  scales = scales.astype(jnp.float32)[:, None, None, None]
  tokens = jnp.broadcast_to(scales, (*x.shape[:3], 1))
  return flat_tokens(tokens, multiple)[:, 0]


def like(x: Array, flat: Array) -> Array:
  """Inverts `flat_tokens`, for the shape of x."""
  return flat[: math.prod(x.shape[:-1])].reshape(x.shape)


def parameters(x: Array) -> Array:
  """Returns parameters [..., D] as the kernels take them."""
  return pad_to_blocks(x.astype(jnp.float32))


def kernel(body: Callable[..., None], *, name: str, **options: Any):
  """Returns a kernel whose threads keep to their own channels.

  It needs no barriers around each store. Before threads read what others wrote
  the body calls `meet`, and before the TMA does, `commit`.
  """
  return plgpu.kernel(
    body,
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      # Sums over channels stay within a warp.
      reduction_scratch_bytes=0,
      # JAX 0.12 would infer layouts by default; these kernels declare them.
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
    **options,
  )


def meet() -> None:
  """Waits until all threads of the warpgroup have read and written."""
  if device().tma:
    plgpu.commit_smem()
  else:
    _barrier()


def _barrier():
  # Pallas has no barrier without a fence for the TMA, which older GPUs lack.
  plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


def commit() -> None:
  """Lets the TMA read what threads wrote, and overwrite what they read."""
  if device().tma:
    plgpu.commit_smem()


def outlet(name: str, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
  """Returns scratch for results, if the TMA copies them out."""
  return {name: plgpu.SMEM(shape, dtype)} if device().tma else {}


def place(tiles: Any, index: Any, target: Any) -> Any:
  """Returns where to write results: a tile of an outlet, or the target."""
  return target if tiles is None else tiles.at[index]


def wait_sent(copies: int) -> None:
  """Waits until at most so many copies still read from shared memory."""
  if device().tma:
    plgpu.wait_smem_to_gmem(copies, wait_read_only=True)


def send(results: Any, target: Any) -> None:
  """Copies results out, unless they have been written to the target."""
  if results is not target:
    plgpu.copy_smem_to_gmem(results, target)


def finish() -> None:
  """Waits until all results have been copied out."""
  if device().tma:
    plgpu.wait_smem_to_gmem(0)


def vector(x: Array) -> Array:
  """Declares that 128 channels are spread over threads, as loops require."""
  return plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def zeros() -> Array:
  """A vector of zeros."""
  return vector(jnp.zeros((CHANNELS,), jnp.float32))


def store_sums(values: Sequence[Array], products: Any, out: Any) -> None:
  """Stores the sums over channels of some vectors.

  Args:
    values: vectors of channels.
    products: reference to [R, 128], float32 in shared memory; R is a multiple
      of 4.
    out: reference to [S], in device memory; S is a multiple of R. What follows
      the sums is undefined.
  """
  rows = products.shape[0]
  for first in range(0, len(values), rows):
    for j, value in enumerate(values[first : first + rows]):
      products[j] = value
    store_channel_sums(products, out.at[pl.ds(first, rows)])


def store_channel_sums(
  products: Any, out: Any, *, threads: int = LANES
) -> None:
  """Stores the sums over channels of the rows in shared memory.

  It waits for all threads' rows before, and for all sums after. A warp sums
  every fourth row, or four rows at once; the threads that load together load
  consecutive channels, which are in different banks of shared memory.

  Args:
    products: reference to [R, 128], float32 in shared memory; R is a multiple
      of 4, or of 16.
    out: reference to [R], float32 in device memory.
    threads: that share a row; 8, for fewer shuffles and loads, or 32.
  """
  if threads == LANES:
    layout = plgpu.Layout.TILED(
      plgpu.Tiling(((4, 32), (1,))),
      warp_dims=(-3,),
      lane_dims=(-2,),
      vector_dim=-1,
    )
  else:
    layout = plgpu.Layout.TILED(
      plgpu.Tiling(((16, 32), (4, 4))),
      warp_dims=(-4,),
      lane_dims=(-2, -3),
      vector_dim=-1,
    )
  meet()
  store(out, jnp.sum(load(products, layout), axis=1))
  meet()


def load(ref: Any, layout: Any) -> Array:
  """Loads in a layout, even if that takes narrow loads."""
  try:
    return plgpu.load(ref, layout=layout, optimized=False)
  except TypeError:  # JAX before 0.12 takes an index as well.
    return plgpu.load(ref, (), layout=layout, optimized=False)


def store(ref: Any, value: Array) -> None:
  """Stores in the value's layout, even if that takes narrow stores."""
  if hasattr(plgpu, "store"):
    # By default JAX 0.12 refuses stores of less than a sector.
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def _log1p_coefficients(degree=9):
  """Returns a polynomial for log(1 + x) / x on [0, 1], Chebyshev's points."""
  points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) / 2
  points += 0.5
  return np.polynomial.Polynomial.fit(
    points, np.log1p(points) / points, degree, domain=[0, 1], window=[0, 1]
  ).coef


LOG1P = _log1p_coefficients()


def softplus(x: Array) -> Array:
  """Returns log(1 + exp(x)), to a relative error of 2e-7.

  Mosaic has no log1p. The GPU's fast logarithm has an absolute error of 2e-7
  near 1, which is as large as the smallest time steps.
  """
  small = jnp.exp(-jnp.abs(x))
  ratio = jnp.full_like(x, LOG1P[-1])
  for coefficient in LOG1P[-2::-1]:
    ratio = ratio * small + np.float32(coefficient)
  return jnp.maximum(x, 0) + ratio * small


def sigmoid(x: Array) -> Array:
  """Returns 1 / (1 + exp(-x)), without overflow."""
  small = jnp.exp(-jnp.abs(x))
  return jnp.where(x < 0, small, 1) / (1 + small)


def add(total: Array | None, term: Array) -> Array:
  """Returns the sum; None stands for zero."""
  return term if total is None else total + term
