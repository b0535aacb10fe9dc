"""An MLP as GPU kernels: what lies between its products stays on the chip.

A warpgroup has 64 tokens. Both products' weights come through shared memory,
some hidden units at a time; tensor cores multiply, and the second product's
sums stay in registers. So forward nothing of the hidden units, four times as
wide as the tokens, reaches device memory. Backward they are made again, and
written for the weights' cotangents, which are products over all tokens: XLA's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.by_platform import Arrays, Dimensions, Kernel, Passes
from spatial_mamba_kernels.gpu_device import device, is_default
from spatial_mamba_kernels.gpu_threads import plgpu
from spatial_mamba_kernels.mlp.gpu_gelu import gelu
from spatial_mamba_kernels.sharding import BATCH, WHOLE
from spatial_mamba_kernels.typing import Array

# Of a warpgroup: the rows of Hopper's matrix products.
TOKENS = 64
WARPGROUPS = 2
# Parts of the weights on their way into shared memory.
STAGES = 2
# More would leave no registers for the rest.
MOST_CHANNELS = 256
# Numbers that four warps exchange for a sum over a warpgroup's tokens.
EXCHANGED = 4 * 32 * 2

_BARRIER_BYTES = 1024

_IMAGE = (BATCH, WHOLE, WHOLE, WHOLE)
_SUMS = ((BATCH, WHOLE, WHOLE), (BATCH, WHOLE)) * 2

DIMENSIONS = Dimensions(
  arguments=(
    *(_IMAGE, (WHOLE, WHOLE), (WHOLE,), (WHOLE, WHOLE), (WHOLE,)),
    *(_IMAGE, (BATCH,)),
  ),
  result=_IMAGE,
  saved=(),
)


def plan(arrays: Arrays) -> None:
  """Raises NotImplementedError where the kernels cannot serve."""
  gpu.check_served(arrays[:-1])
  x, w1, *_ = arrays
  # Elsewhere what the first product gives is kept, which is decided in tracing.
  if not is_default() or not device().wgmma:
    raise NotImplementedError(
      "mosaic_gpu multiplies by Hopper's tensor cores: make such a GPU JAX's"
      " default device"
    )
  if x.dtype != jnp.bfloat16:
    raise NotImplementedError(
      f"mosaic_gpu multiplies bfloat16 alone, not {x.dtype}"
    )
  channels, hidden = w1.shape
  if channels % 32 or channels > MOST_CHANNELS:
    raise NotImplementedError(
      f"mosaic_gpu multiplies 32 channels or a multiple, up to {MOST_CHANNELS},"
      f" not {channels}"
    )
  for images in (1, 2):
    _units_of(channels, hidden, images)


def _units_of(channels, hidden, images):
  """Hidden units at a time, where so many images of tokens come."""
  for units in (64, 32):
    tokens = WARPGROUPS * TOKENS * images * (channels + units)
    numbers = tokens + STAGES * 2 * channels * units
    others = 4 * WARPGROUPS * EXCHANGED + _BARRIER_BYTES
    if hidden % units == 0 and 2 * numbers + others <= device().smem_bytes:
      return units
  raise NotImplementedError(
    f"mosaic_gpu computes 32 hidden units at a time, not {hidden} in all"
  )


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The result on one device; there is nothing to save."""
  del save
  x, w1, b1, w2, b2, residual, branch_scale = arrays
  flat = _flat(x)
  y = _call(
    _forward_kernel,
    [flat],
    (_flat(residual), _scales(branch_scale, x)),
    (w1, w2),
    (b1, b2),
    jax.ShapeDtypeStruct(flat.shape, x.dtype),
    name="mlp_forward",
  )
  return (gpu.like(x, y),)


def run_backward(arrays: Arrays, saved: Arrays, dy: Array) -> Arrays:
  """The cotangents of x, and [1, ...] of weights and biases."""
  del saved
  x, w1, b1, w2, _, _, branch_scale = arrays
  flat, dflat, scales = _flat(x), _flat(dy), _scales(branch_scale, x)
  tokens, width = len(flat), w1.shape[1]
  groups = WARPGROUPS * _programs(tokens)
  dx, hidden, dhidden, db1 = _call(
    _backward_kernel,
    [flat, dflat],
    (scales,),
    (w1, w2),
    (b1,),
    [
      jax.ShapeDtypeStruct(flat.shape, x.dtype),
      *(jax.ShapeDtypeStruct((tokens, width), x.dtype) for _ in range(2)),
      jax.ShapeDtypeStruct((groups, width), jnp.float32),
    ],
    name="mlp_backward",
    exchanged=plgpu.SMEM((WARPGROUPS, EXCHANGED), jnp.float32),
  )
  sums = partial(jnp.einsum, preferred_element_type=jnp.float32)
  cotangents = (
    sums("tc,tf->cf", flat, dhidden),
    jnp.sum(db1, 0),
    sums("tf,tc->fc", hidden, dflat),
    jnp.sum(scales[:, None] * dflat.astype(jnp.float32), 0),
  )
  return gpu.like(x, dx), *(x[None] for x in cotangents), dy


def _finish(arrays, sums):
  dx, *cotangents, dy = sums
  cotangents = (jnp.sum(x, axis=0) for x in cotangents)
  return dx, *cotangents, dy, jnp.zeros_like(arrays[-1])


KERNEL = Kernel(
  plan, Passes(run_forward, run_backward), _finish, (_IMAGE, *_SUMS, _IMAGE)
)


def _flat(x):
  """As [T, C], with zeros so that all programs have tokens enough."""
  return gpu.flat_tokens(x, WARPGROUPS * TOKENS)


def _scales(branch_scale, x):
  """[B] as [T]."""
  return gpu.token_scales(branch_scale, x, WARPGROUPS * TOKENS)


def _programs(tokens):
  return tokens // (WARPGROUPS * TOKENS)


def _call(kernel, images, others, weights, biases, results, *, name, **scratch):
  """Runs a kernel over tokens.

  Args:
    kernel: (*images, *others, *weights, *biases, *results, **scratch).
    images: each [T, C], to be copied into shared memory.
    others: what else there is of tokens, each [T, ...].
    weights: of the first product, [C, F], and of the second, [F, C].
    biases: what the kernel takes of them.
    results: shapes and types.
    name: of the kernel.
    **scratch: what else it takes.
  """
  tokens, channels = images[0].shape
  units = _units_of(channels, weights[0].shape[1], len(images))
  # Tensor cores read shared memory in rows of one width, whose order copies
  # change so that its banks are read evenly.
  width = math.gcd(64, channels, units)
  layout = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width)

  def tiles(*shape):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=layout)

  return plgpu.kernel(
    kernel,
    out_type=results,
    scratch_types={
      "images": tiles(len(images), WARPGROUPS, TOKENS, channels),
      "hidden": tiles(len(images), WARPGROUPS, TOKENS, units),
      "come": plgpu.Barrier(num_arrivals=len(images), num_barriers=WARPGROUPS),
      "w1_tiles": tiles(STAGES, channels, units),
      "w2_tiles": tiles(STAGES, units, channels),
      "weights_come": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      "used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
      **scratch,
    },
    grid=(_programs(tokens),),
    grid_names=("program",),
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      # Pallas has one for all warpgroups, in which they would meet.
      reduction_scratch_bytes=0,
      lowering_semantics=plgpu.LoweringSemantics.Lane,
    ),
  )(
    *images,
    *others,
    *(x.astype(jnp.bfloat16) for x in weights),
    *(x.astype(jnp.float32) for x in biases),
  )


def _forward_kernel(
  x, residual, scales, w1, w2, b1, b2, y, *, images, hidden, come, **scratch
):
  me, own = _own_tokens()
  tokens, tile = images.at[0, me], hidden.at[0, me]
  plgpu.copy_gmem_to_smem(x.at[own], tokens, come.at[me])
  scale = gpu.load(scales.at[own], plgpu.Layout.WGMMA.reduce(1))
  plgpu.barrier_wait(come.at[me])

  def add(total, units, w1_tile, w2_tile):
    bias = _row(b1.at[units])
    g, _ = gelu(_product(tokens, w1_tile) + bias)
    _store(tile, _scaled(g, scale))
    plgpu.wgmma(total, tile, w2_tile)

  total = _for_units(add, tokens.shape, w1, w2, **scratch)
  # Sooner there are no registers for it.
  total += gpu.load(residual.at[own], plgpu.Layout.WGMMA).astype(jnp.float32)
  _store(tokens, total + _scaled(_row(b2), scale))
  plgpu.copy_smem_to_gmem(tokens, y.at[own])
  plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
  x, dy, scales, w1, w2, b1, dx, g, dh, db1, *, images, hidden, come, exchanged,
  **scratch
):  # fmt: skip
  me, own = _own_tokens()
  tokens, cotangents = images.at[0, me], images.at[1, me]
  g_tile, dh_tile = hidden.at[0, me], hidden.at[1, me]
  plgpu.copy_gmem_to_smem(x.at[own], tokens, come.at[me])
  plgpu.copy_gmem_to_smem(dy.at[own], cotangents, come.at[me])
  scale = gpu.load(scales.at[own], plgpu.Layout.WGMMA.reduce(1))
  plgpu.barrier_wait(come.at[me])

  def add(total, units, w1_tile, w2_tile):
    bias = _row(b1.at[units])
    value, slope = gelu(_product(tokens, w1_tile) + bias)
    cotangent = slope * _product(cotangents, w2_tile.transpose((1, 0)))
    # Of what the second product was given, which XLA multiplies by dy.
    value, cotangent = (_scaled(x, scale) for x in (value, cotangent))
    # Until the ones before have been copied out.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _store(g_tile, value)
    _store(dh_tile, cotangent)
    plgpu.copy_smem_to_gmem(g_tile, g.at[own, units])
    plgpu.copy_smem_to_gmem(dh_tile, dh.at[own, units])
    plgpu.wgmma(total, dh_tile, w1_tile.transpose((1, 0)))
    group = WARPGROUPS * lax.axis_index("program") + me
    db1[group, units] = sum_tokens(cotangent, exchanged.at[me])

  total = _for_units(add, tokens.shape, w1, w2, **scratch)
  _store(tokens, total)
  plgpu.copy_smem_to_gmem(tokens, dx.at[own])
  plgpu.wait_smem_to_gmem(0)


def _own_tokens():
  """This warpgroup, and its tokens."""
  me = lax.axis_index("warpgroup")
  first = (WARPGROUPS * lax.axis_index("program") + me) * TOKENS
  return me, pl.ds(first, TOKENS)


def _for_units(
  add: Callable[..., None],
  shape: tuple[int, int],
  w1: Any,
  w2: Any,
  *,
  w1_tiles: Any,
  w2_tiles: Any,
  weights_come: Any,
  used: Any,
) -> Array:
  """Sums over hidden units.

  Args:
    add: (sums, units, w1_tile, w2_tile) -> nothing; starts to add what some
      hidden units give.
    shape: of the sums.
    w1: weights of the first product, [C, F] in device memory.
    w2: weights of the second, [F, C].
    w1_tiles: where they come, [STAGES, C, units].
    w2_tiles: and these, [STAGES, units, C].
    weights_come: a barrier for each stage.
    used: a barrier for each stage.
  """
  me, size = lax.axis_index("warpgroup"), w1_tiles.shape[-1]
  parts = w1.shape[1] // size

  def units_of(part):
    return pl.ds(part * size, size)

  def fetch(part):
    slot = lax.rem(part, STAGES)
    for source, tiles in (
      (w1.at[:, units_of(part)], w1_tiles),
      (w2.at[units_of(part)], w2_tiles),
    ):
      plgpu.copy_gmem_to_smem(source, tiles.at[slot], weights_come.at[slot])

  def step(part, total):
    slot = lax.rem(part, STAGES)
    plgpu.barrier_wait(weights_come.at[slot])
    add(total, units_of(part), w1_tiles.at[slot], w2_tiles.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(used.at[slot])

    @pl.when((me == 0) & (part + STAGES < parts))
    def _():
      plgpu.barrier_wait(used.at[slot])
      fetch(part + STAGES)

  def run(total):
    lax.fori_loop(0, parts, lambda part, _: step(part, total), None)
    return total[...]

  @pl.when(me == 0)
  def _():
    for part in range(min(STAGES, parts)):
      fetch(jnp.int32(part))

  return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _product(a, b):
  def multiply(total):
    plgpu.wgmma(total, a, b)
    return total[...]

  return pl.run_scoped(
    multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]))
  )


def sum_tokens(values: Array, exchanged: Any) -> Array:
  """The sums over rows, by way of a reference to `EXCHANGED` numbers."""

  def reduce(_, values, exchanged):
    return values.reduce("add", 0, exchanged)

  result = plgpu.ShapeDtypeStruct(
    values.shape[1:], values.dtype, plgpu.Layout.WGMMA.reduce(0)
  )
  inlined: Any = plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result
  )
  return inlined(reduce)(values, exchanged)


def _row(ref):
  """A vector in device memory as each token's row."""
  layout = plgpu.Layout.WGMMA.reduce(0)
  vector = gpu.load(ref, layout)
  return lax.broadcast_in_dim(vector, (TOKENS, *vector.shape), (1,))


def _scaled(values, scale):
  """Times a number of each token; zero where that is, whatever was there."""
  scale = lax.broadcast_in_dim(scale, values.shape, (0,))
  return jnp.where(scale > 0, values * scale, 0)


def _store(tile, values):
  """Stores where copies and tensor cores read."""
  tile[...] = values.astype(tile.dtype)
  plgpu.commit_smem()
