"""State fusion as TPU kernels.

Row r of an image comes while row r - reach is fused, whose neighbours have then
all come; the last rows of states stay in a ring. So do, backward, the last rows
of cotangents. See `tpu.rows` for how arrays lie.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.state_fusion.plans import tpu_plan
from spatial_mamba_kernels.taps import Stencil
from spatial_mamba_kernels.tpu import rows
from spatial_mamba_kernels.tpu.fusion import (
  CotangentRing,
  fuse_tile,
  states_backward,
  weights_backward_tile,
)
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool, stencil: Stencil) -> Arrays:
  """The fused states [B, H, W, D] on one device; there is nothing to save."""
  del save
  h, *weights = arrays
  cut = tpu_plan(arrays, stencil=stencil)
  h = rows.rows_of(h, cut.group)
  y = forward(h, stencil.merge(*weights), stencil=stencil, cut=cut)
  return (rows.images_of(y, len(arrays[0])),)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Array, *, stencil: Stencil
) -> Arrays:
  """The cotangents [B, H, W, D], and [G, T, D] of the merged weights."""
  del saved
  h, *weights = arrays
  cut = tpu_plan(arrays, stencil=stencil)
  dh, dweights = backward(
    rows.rows_of(h, cut.group),
    stencil.merge(*weights),
    rows.rows_of(g, cut.group),
    stencil=stencil,
    cut=cut,
  )
  return rows.images_of(dh, len(h)), dweights


def forward(h, weights, *, stencil, cut):
  """Fuses [H, W, G, b, D] by weights [T, D]."""
  height, width, groups, group, channels = h.shape
  reach, window = stencil.reach, stencil.window
  return pl.pallas_call(
    partial(_forward_kernel, height=height, stencil=stencil),
    grid=(groups, -(-channels // cut.block), height + reach),
    in_specs=[
      rows.image_spec(width, cut, lambda step: jnp.minimum(step, height - 1)),
      rows.parameter_spec(len(stencil.taps), cut),
    ],
    out_specs=rows.image_spec(
      width, cut, lambda step: jnp.maximum(step - reach, 0)
    ),
    out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype),
    scratch_shapes=[
      pltpu.VMEM((window, width, 1, group, cut.block), jnp.float32)
    ],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      (h, weights), h, flops=2 * len(stencil.taps), transcendentals=0
    ),
    name="state_fusion_forward",
  )(h, weights)


def _forward_kernel(h, weights, y, ring, *, height, stencil):
  r = pl.program_id(2)
  width, _, channels = h.shape

  @pl.when(r < height)
  def _():
    ring[r % stencil.window, :, 0] = h[...].astype(jnp.float32)

  @pl.when(r >= stencil.reach)
  def _():
    slots = stencil.slots(r - stencil.reach, height, stencil.window)

    def fuse(lanes):
      def tile(first, size, _):
        fused = fuse_tile(stencil, ring, slots, 0, lanes, weights, first, size)
        for j, value in enumerate(fused):
          y[first + j, :, lanes] = value.astype(y.dtype)

      rows.for_tiles(width, tile, None)

    rows.for_lanes(channels, fuse)


def backward(h, weights, g, *, stencil, cut):
  """Cotangents of [H, W, G, b, D] and, [G, T, D], of the weights.

  Those of the weights are sums over a group of images.
  """
  height, width, groups, group, channels = h.shape
  reach, sums = stencil.reach, len(stencil.taps)
  row = (width, 1, group, cut.block)

  def coming(step):
    return jnp.minimum(step, height - 1)

  image = rows.image_spec(width, cut, coming)
  arguments = (h, g, weights)
  results = [
    jax.ShapeDtypeStruct(h.shape, h.dtype),
    jax.ShapeDtypeStruct((groups, sums, channels), jnp.float32),
  ]
  return pl.pallas_call(
    partial(_backward_kernel, height=height, stencil=stencil),
    grid=(groups, -(-channels // cut.block), height + reach),
    in_specs=[image, image, rows.parameter_spec(sums, cut)],
    out_specs=[
      rows.image_spec(width, cut, lambda step: jnp.maximum(step - reach, 0)),
      rows.sums_spec(sums, cut),
    ],
    out_shape=results,
    scratch_shapes=[
      pltpu.VMEM((stencil.window, *row), jnp.float32),
      pltpu.VMEM((stencil.cotangent_rows, *row), jnp.float32),
      pltpu.VMEM(row, jnp.float32),
      pltpu.VMEM((sums, group, cut.block), jnp.float32),
    ],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments, results, flops=4 * sums, transcendentals=0
    ),
    name="state_fusion_backward",
  )(*arguments)


def _backward_kernel(
  h, g, weights, dh, dweights, ring, dring, dstates, sums, *, height, stencil
):
  r = pl.program_id(2)
  width, _, channels = h.shape
  cotangents = CotangentRing(stencil, dring, height)

  @pl.when(r == 0)
  def _():
    sums[...] = jnp.zeros_like(sums)
    cotangents.clear()

  @pl.when(r < height)
  def _():
    ring[r % stencil.window, :, 0] = h[...].astype(jnp.float32)
    dring[r % stencil.window, :, 0] = g[...].astype(jnp.float32)

  @pl.when(r >= stencil.reach)
  def _():
    row = r - stencil.reach
    slots = stencil.slots(row, height, stencil.window)
    cotangents.add_border_rows(row)
    sources = cotangents.sources(row)

    def finish(lanes):
      def tile(first, size, _):
        weights_backward_tile(
          stencil, ring, slots, dring.at[slots[0]], 0, lanes, weights, sums,
          first, size,
        )  # fmt: skip

      rows.for_tiles(width, tile, None)
      states_backward(stencil, dring, sources, weights, dstates, lanes)
      dh[:, :, lanes] = dstates[:, 0, :, lanes].astype(dh.dtype)

    rows.for_lanes(channels, finish)

  @pl.when(r == height + stencil.reach - 1)
  def _():
    dweights[...] = jnp.sum(sums[...], axis=1)
