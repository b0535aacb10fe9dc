"""An MLP as GPU kernels that keep its hidden units on the chip.

A warpgroup has 64 tokens. The weights of both products are loaded into shared
memory, some hidden units at a time; the sums of the second product stay in
registers. Thus the hidden units, four times as wide as the tokens, never reach
device memory in the forward pass; the backward pass recomputes them. The
weights' cotangents are products over all tokens. `gpu_weights` computes them if
it can, otherwise XLA, for which the hidden units are stored.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.mlp import gpu_weights
from spatial_mamba_kernels.mlp.gpu_gelu import gelu
from spatial_mamba_kernels.mlp.gpu_products import (
  EXCHANGED,
  TOKENS,
  WARPGROUPS,
  compiler_params,
  flat_tokens,
  product,
  scaled,
  store,
  sum_rows,
  tiles,
  token_scales,
)
from spatial_mamba_kernels.mlp.plans import STAGES, units_of_weights
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """Returns the result on one device; saves nothing."""
  del save
  x, w1, b1, w2, b2, residual, branch_scale = arrays
  flat = flat_tokens(x)
  y = _call(
    _forward_kernel,
    [flat],
    (flat_tokens(residual), token_scales(branch_scale, x)),
    (w1, w2),
    (b1, b2),
    jax.ShapeDtypeStruct(flat.shape, x.dtype),
    name="mlp_forward",
  )
  return (gpu.like(x, y),)


def run_backward(arrays: Arrays, saved: Arrays, dy: Array) -> Arrays:
  """Returns the cotangents of x and, [1, ...], of weights and biases."""
  del saved
  x, w1, b1, w2, _, _, branch_scale = arrays
  flat, dflat = flat_tokens(x), flat_tokens(dy)
  arguments = flat, dflat, token_scales(branch_scale, x), w1, b1, w2
  if gpu_weights.is_whole(*w1.shape):
    dw1, db1, dw2, dx, db2 = gpu_weights.cotangents(*arguments)
  elif gpu_weights.serves(*w1.shape):
    dw1, db1, dw2 = gpu_weights.cotangents(*arguments)
    dx, db2 = _backward(*arguments, is_hidden_kept=False)
  else:
    dx, db2, hidden, dhidden, db1 = _backward(*arguments, is_hidden_kept=True)
    sums = partial(jnp.einsum, preferred_element_type=jnp.float32)
    dw1 = sums("tc,tf->cf", flat, dhidden)
    dw2 = sums("tf,tc->fc", hidden, dflat)
    db1 = jnp.sum(db1, 0)
  return gpu.like(x, dx), *(x[None] for x in (dw1, db1, dw2, db2)), dy


def _backward(x, dy, scales, w1, b1, w2, *, is_hidden_kept):
  """Returns the cotangents of x and b2 and, if kept, three sets of arrays.

  These are the hidden units after the GELU and their cotangents before it, both
  [T, F], and the sums of the latter over the tokens of each warpgroup.
  """
  tokens, hidden = len(x), w1.shape[1]
  groups = tokens // TOKENS
  results = [
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.ShapeDtypeStruct((groups, x.shape[1]), jnp.float32),
  ]
  if is_hidden_kept:
    kept = jax.ShapeDtypeStruct((tokens, hidden), x.dtype)
    sums = jax.ShapeDtypeStruct((groups, hidden), jnp.float32)
    results += [kept, kept, sums]
  dx, db2, *others = _call(
    _backward_kernel,
    [x, dy],
    (scales,),
    (w1, w2),
    (b1,),
    results,
    name="mlp_backward",
    exchanged=plgpu.SMEM((WARPGROUPS, EXCHANGED), jnp.float32),
  )
  return dx, jnp.sum(db2, 0), *others


def _programs(tokens):
  return tokens // (WARPGROUPS * TOKENS)


def _call(kernel, images, others, weights, biases, results, *, name, **scratch):
  """Runs a kernel over tokens.

  Args:
    kernel: (*images, *others, *weights, *biases, *results, **scratch).
    images: each [T, C], to be copied into shared memory.
    others: other arrays of tokens, each [T, ...].
    weights: of the first product, [C, F], and of the second, [F, C].
    biases: those that the kernel takes.
    results: their types.
    name: of the kernel.
    **scratch: further scratch.
  """
  tokens, channels = images[0].shape
  units = units_of_weights(channels, weights[0].shape[1], len(images))
  tile = partial(tiles, math.gcd(64, channels, units))
  return plgpu.kernel(
    kernel,
    out_type=results,
    scratch_types={
      "images": tile(len(images), WARPGROUPS, TOKENS, channels),
      "hidden": tile(len(images), WARPGROUPS, TOKENS, units),
      "come": plgpu.Barrier(num_arrivals=len(images), num_barriers=WARPGROUPS),
      "w1_tiles": tile(STAGES, channels, units),
      "w2_tiles": tile(STAGES, units, channels),
      "weights_come": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      "used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
      **scratch,
    },
    grid=(_programs(tokens),),
    grid_names=("program",),
    num_threads=WARPGROUPS,
    thread_name="warpgroup",
    kernel_name=name,
    compiler_params=compiler_params(),
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
    g, _ = gelu(product(tokens, w1_tile) + bias)
    store(tile, scaled(g, scale))
    plgpu.wgmma(total, tile, w2_tile)

  total = _for_units(add, tokens.shape, w1, w2, **scratch)
  # Loaded late, because there are no registers for it before.
  total += gpu.load(residual.at[own], plgpu.Layout.WGMMA).astype(jnp.float32)
  store(tokens, total + scaled(_row(b2), scale))
  plgpu.copy_smem_to_gmem(tokens, y.at[own])
  plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
  x, dy, scales, w1, w2, b1, dx, db2, *kept, images, hidden, come, exchanged,
  **scratch
):  # fmt: skip
  me, own = _own_tokens()
  tokens, cotangents = images.at[0, me], images.at[1, me]
  g_tile, dh_tile = hidden.at[0, me], hidden.at[1, me]
  plgpu.copy_gmem_to_smem(x.at[own], tokens, come.at[me])
  plgpu.copy_gmem_to_smem(dy.at[own], cotangents, come.at[me])
  scale = gpu.load(scales.at[own], plgpu.Layout.WGMMA.reduce(1))
  group = WARPGROUPS * lax.axis_index("program") + me
  plgpu.barrier_wait(come.at[me])
  width = math.gcd(64, x.shape[1])

  def sum_columns(part, _):
    columns = pl.ds(part * width, width)
    values = gpu.load(cotangents.at[:, columns], plgpu.Layout.WGMMA)
    values = scaled(values.astype(jnp.float32), scale)
    db2[group, columns] = sum_rows(values, exchanged.at[me])

  lax.fori_loop(0, x.shape[1] // width, sum_columns, None)

  def add(total, units, w1_tile, w2_tile):
    bias = _row(b1.at[units])
    value, slope = gelu(product(tokens, w1_tile) + bias)
    cotangent = slope * product(cotangents, w2_tile.transpose((1, 0)))
    cotangent = scaled(cotangent, scale)
    if kept:
      # Wait until the tiles' last values have been copied out.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      # The left factor of dw2, which XLA multiplies by dy.
      store(g_tile, scaled(value, scale))
    store(dh_tile, cotangent)
    if kept:
      g, dh, _ = kept
      plgpu.copy_smem_to_gmem(g_tile, g.at[own, units])
      plgpu.copy_smem_to_gmem(dh_tile, dh.at[own, units])
    plgpu.wgmma(total, dh_tile, w1_tile.transpose((1, 0)))
    if kept:
      *_, db1 = kept
      db1[group, units] = sum_rows(cotangent, exchanged.at[me])

  total = _for_units(add, tokens.shape, w1, w2, **scratch)
  store(tokens, total)
  plgpu.copy_smem_to_gmem(tokens, dx.at[own])
  plgpu.wait_smem_to_gmem(0)


def _own_tokens():
  """Returns the index of this warpgroup, and the slice of its tokens."""
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
    add: called with (sums, units, w1_tile, w2_tile); starts to add the part of
      some hidden units.
    shape: of the sums.
    w1: weights of the first product, [C, F] in device memory.
    w2: weights of the second, [F, C].
    w1_tiles: their slots in shared memory, [STAGES, C, units].
    w2_tiles: those of the second, [STAGES, units, C].
    weights_come: barriers, one a slot; the weights are loaded.
    used: barriers, one a slot; both warpgroups are done with the weights.
  """
  me, size = lax.axis_index("warpgroup"), w1_tiles.shape[-1]
  parts = w1.shape[1] // size

  def units_of(part):
    return pl.ds(part * size, size)

  def fetch(part):
    slot = lax.rem(part, STAGES)
    for source, stages in (
      (w1.at[:, units_of(part)], w1_tiles),
      (w2.at[units_of(part)], w2_tiles),
    ):
      plgpu.copy_gmem_to_smem(source, stages.at[slot], weights_come.at[slot])

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


def _row(ref):
  """Loads a vector, and repeats it for each token."""
  layout = plgpu.Layout.WGMMA.reduce(0)
  vector = gpu.load(ref, layout)
  return lax.broadcast_in_dim(vector, (TOKENS, *vector.shape), (1,))
