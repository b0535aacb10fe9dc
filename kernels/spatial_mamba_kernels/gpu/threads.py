"""What the GPU kernels share: a thread for each channel, 128 to a program.

A vector of 128 channels lies across a warpgroup, one channel a thread, so that
a recurrence over tokens and a stencil over pixels never leave their thread: no
thread waits for another, but for what is copied beside them and for sums over
channels. Since Hopper the tensor memory accelerator (TMA) copies tokens and
rows through shared memory, and leaves out what is beyond an array's end (but
see `room`). Before it, each thread copies its own channel: what it will need
next is on its way to registers while it computes, and results go straight to
device memory.
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
from spatial_mamba_kernels.gpu.plan import ROWS_SUMMED as ROWS_SUMMED
from spatial_mamba_kernels.gpu.plan import blocks as blocks
from spatial_mamba_kernels.gpu.plan import is_one_piece as is_one_piece
from spatial_mamba_kernels.gpu.plan import room as room
from spatial_mamba_kernels.gpu.plan import split as split
from spatial_mamba_kernels.typing import Array

# Versions of JAX differ in what it has.
plgpu: Any = mosaic_gpu


def pad_channels(x: Array) -> Array:
  """Fills channels up where copies ask for it.

  The TMA asks for rows of 16 bytes; threads for whole blocks.
  """
  channels = x.shape[-1]
  if device().tma and channels % 8 == 0:
    return x
  return pad_to_blocks(x)


def pad_to_blocks(x: Array) -> Array:
  """Fills channels up to whole blocks."""
  padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % CHANNELS)]
  return jnp.pad(x, padding)


def flat_tokens(x: Array, multiple: int) -> Array:
  """[B, H, W, C] as [T, C], with zeros up to a multiple of tokens."""
  flat = x.reshape(-1, x.shape[-1])
  return jnp.pad(flat, ((0, -len(flat) % multiple), (0, 0)))


def token_scales(scales: Array, x: Array, multiple: int) -> Array:
  """[B] as [T], in float32, each image's for all of its tokens."""
  scales = scales.astype(jnp.float32)[:, None, None, None]
  tokens = jnp.broadcast_to(scales, (*x.shape[:3], 1))
  return flat_tokens(tokens, multiple)[:, 0]


def like(x: Array, flat: Array) -> Array:
  """Without the zeros of `flat_tokens`, in the shape of x."""
  return flat[: math.prod(x.shape[:-1])].reshape(x.shape)


def parameters(x: Array) -> Array:
  """[..., D] as the kernels take them."""
  return pad_to_blocks(x.astype(jnp.float32))


def kernel(body: Callable[..., None], *, name: str, **options: Any):
  """A kernel whose threads keep to their own channels.

  That makes barriers around each store needless. Where threads do read what
  others wrote `meet` stands between, and `commit` where the TMA does.
  """
  return plgpu.kernel(
    body,
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      unsafe_no_auto_barriers=True,
      # Sums over channels stay within a warp.
      reduction_scratch_bytes=0,
      # Layouts are as said here, and not inferred, as by JAX 0.12's default.
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
  # Pallas has none without a fence for the TMA, which older GPUs do not know.
  plgpu.inline_mgpu()(lambda _: mgpu.warpgroup_barrier())()


def commit() -> None:
  """Lets the TMA read what threads wrote, and overwrite what they read."""
  if device().tma:
    plgpu.commit_smem()


def outlet(name: str, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
  """Scratch for results, if it is the TMA that copies them out."""
  return {name: plgpu.SMEM(shape, dtype)} if device().tma else {}


def place(tiles: Any, index: Any, target: Any) -> Any:
  """Where results go first: into one of an outlet's tiles, or to the target."""
  return target if tiles is None else tiles.at[index]


def wait_sent(copies: int) -> None:
  """Waits until no more copies of results are being read from shared memory."""
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
  """Lays 128 channels across the threads, as loops need it said."""
  return plgpu.layout_cast(x, plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def zeros() -> Array:
  """A vector of zeros."""
  return vector(jnp.zeros((CHANNELS,), jnp.float32))


def store_sums(values: Sequence[Array], products: Any, out: Any) -> None:
  """Sums over channels.

  Args:
    values: vectors of channels.
    products: reference to [R, 128], float32 in shared memory; R in fours.
    out: reference to [S], in device memory; S is a multiple of R, and from the
      number of vectors on anything may be written.
  """
  rows = products.shape[0]
  for first in range(0, len(values), rows):
    for j, value in enumerate(values[first : first + rows]):
      products[j] = value
    store_channel_sums(products, out.at[pl.ds(first, rows)])


def store_channel_sums(products: Any, out: Any) -> None:
  """Sums over channels, which all threads must have written and may overwrite.

  A warp takes every fourth row, whose channels its threads load in order, so
  that they meet no bank of shared memory twice.

  Args:
    products: reference to [R, 128], float32 in shared memory; R in fours.
    out: reference to [R], float32 in device memory.
  """
  layout = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 32), (1,))),
    warp_dims=(-3,),
    lane_dims=(-2,),
    vector_dim=-1,
  )
  meet()
  store(out, jnp.sum(load(products, layout), axis=1))
  meet()


def load(ref: Any, layout: Any) -> Array:
  """Loads as a layout says, in however small pieces."""
  try:
    return plgpu.load(ref, layout=layout, optimized=False)
  except TypeError:  # JAX before 0.12 takes an index as well.
    return plgpu.load(ref, (), layout=layout, optimized=False)


def store(ref: Any, value: Array) -> None:
  """Stores as a layout says, in however small pieces."""
  if hasattr(plgpu, "store"):
    # JAX 0.12 would ask for whole sectors of memory.
    plgpu.store(ref, value, optimized=False)
  else:
    ref[...] = value


def _log1p_coefficients(degree=9):
  """Of log(1 + x) / x on [0, 1], interpolated at Chebyshev's points."""
  points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) / 2
  points += 0.5
  return np.polynomial.Polynomial.fit(
    points, np.log1p(points) / points, degree, domain=[0, 1], window=[0, 1]
  ).coef


LOG1P = _log1p_coefficients()


def softplus(x: Array) -> Array:
  """log(1 + exp(x)), to 2e-7 of it.

  Mosaic has no log1p, and the GPU's fast logarithm is off by 2e-7 near 1, where
  a small time step is that small itself.
  """
  small = jnp.exp(-jnp.abs(x))
  ratio = jnp.full_like(x, LOG1P[-1])
  for coefficient in LOG1P[-2::-1]:
    ratio = ratio * small + np.float32(coefficient)
  return jnp.maximum(x, 0) + ratio * small


def sigmoid(x: Array) -> Array:
  """1 / (1 + exp(-x)), without overflow."""
  small = jnp.exp(-jnp.abs(x))
  return jnp.where(x < 0, small, 1) / (1 + small)


def add(total: Array | None, term: Array) -> Array:
  """Sums that start from nothing."""
  return term if total is None else total + term
