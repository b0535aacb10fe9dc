"""State fusion as TPU kernels.

A step loads row r of an image into a ring and fuses row r - reach, all of whose
neighbours are then in the ring. The backward pass keeps a second ring, of
cotangents. `tpu.rows` describes the layout of arrays.
"""

from functools import partial
from typing import Any, NamedTuple

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
  Tile,
  Window,
  fuse_tile,
  states_backward,
  weights_backward_tile,
)
from spatial_mamba_kernels.typing import Array


def run_forward(arrays: Arrays, *, save: bool, stencil: Stencil) -> Arrays:
  """Returns the fused states [B, H, W, D] on one device; saves nothing."""
  del save
  h, *weights = arrays
  cut = tpu_plan(arrays, stencil=stencil)
  h = rows.rows_of(h, cut.group)
  y = forward(h, stencil.merge(*weights), stencil=stencil, cut=cut)
  return (rows.images_of(y, len(arrays[0])),)


def run_backward(
  arrays: Arrays, saved: Arrays, g: Array, *, stencil: Stencil
) -> Arrays:
  """Returns dh [B, H, W, D], and of the merged weights [G, T, D]."""
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
  """Returns the fused states [H, W, G, b, D], by weights [T, D]."""
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


def _forward_kernel(h_ref, weights_ref, y_ref, ring_ref, *, height, stencil):
  r = pl.program_id(2)
  width, _, channels = h_ref.shape

  # Load row r, if the image has it.
  @pl.when(r < height)
  def _():
    ring_ref[r % stencil.window, :, 0] = h_ref[...].astype(jnp.float32)

  # Fuse the row whose last neighbour this is.
  @pl.when(r >= stencil.reach)
  def _():
    slots = stencil.slots(r - stencil.reach, height, stencil.window)
    window = Window(stencil, ring_ref, slots, weights_ref)

    def fuse(lanes):
      def tile(first, size, _):
        fused = fuse_tile(window, Tile(first, size, 0, lanes))
        for j, value in enumerate(fused):
          y_ref[first + j, :, lanes] = value.astype(y_ref.dtype)

      rows.for_tiles(width, tile, None)

    rows.for_lanes(channels, fuse)


class _Scratch(NamedTuple):
  """References to the backward kernel's scratch, float32.

  Attributes:
    ring_ref: rows of states, [window, W, 1, b, D].
    dring_ref: rows of cotangents, a `CotangentRing`.
    dh_ref: cotangents of a row of states, [W, 1, b, D].
    sums_ref: cotangents of the weights, [T, b, D].
  """

  ring_ref: Any
  dring_ref: Any
  dh_ref: Any
  sums_ref: Any


def backward(h, weights, g, *, stencil, cut):
  """Returns dh [H, W, G, b, D], and of the weights [G, T, D].

  Cotangents of the weights are summed over a group of images.
  """
  height, width, groups, group, channels = h.shape
  reach, sums = stencil.reach, len(stencil.taps)
  row = (width, 1, group, cut.block)

  def loaded(step):
    return jnp.minimum(step, height - 1)

  image = rows.image_spec(width, cut, loaded)
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
    scratch_shapes=(
      _Scratch(
        ring_ref=pltpu.VMEM((stencil.window, *row), jnp.float32),
        dring_ref=pltpu.VMEM((stencil.cotangent_rows, *row), jnp.float32),
        dh_ref=pltpu.VMEM(row, jnp.float32),
        sums_ref=pltpu.VMEM((sums, group, cut.block), jnp.float32),
      ),
    ),
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments, results, flops=4 * sums, transcendentals=0
    ),
    name="state_fusion_backward",
  )(*arguments)


def _backward_kernel(
  h_ref, g_ref, weights_ref, dh_ref, dweights_ref, scratch: _Scratch, *,
  height, stencil,
):  # fmt: skip
  r = pl.program_id(2)
  width, _, channels = h_ref.shape
  cotangents = CotangentRing(stencil, scratch.dring_ref, height)

  # Before the first row, nothing has been summed.
  @pl.when(r == 0)
  def _():
    scratch.sums_ref[...] = jnp.zeros_like(scratch.sums_ref)
    cotangents.clear()

  # Load row r of states and of cotangents, if the image has it.
  @pl.when(r < height)
  def _():
    for ring_ref, x_ref in (
      (scratch.ring_ref, h_ref),
      (scratch.dring_ref, g_ref),
    ):
      ring_ref[r % stencil.window, :, 0] = x_ref[...].astype(jnp.float32)

  # Transpose the stencil for the row whose last neighbour this is.
  @pl.when(r >= stencil.reach)
  def _():
    row = r - stencil.reach
    slots = stencil.slots(row, height, stencil.window)
    cotangents.add_border_rows(row)
    window = Window(stencil, scratch.ring_ref, slots, weights_ref)
    transposed = window._replace(
      ring_ref=scratch.dring_ref, slots=cotangents.sources(row)
    )

    def finish(lanes):
      def tile(first, size, _):
        weights_backward_tile(
          window,
          Tile(first, size, 0, lanes),
          scratch.dring_ref.at[slots[0]],
          scratch.sums_ref,
        )

      rows.for_tiles(width, tile, None)
      states_backward(transposed, scratch.dh_ref, lanes)
      dh_ref[:, :, lanes] = scratch.dh_ref[:, 0, :, lanes].astype(dh_ref.dtype)

    rows.for_lanes(channels, finish)

  # After the last row, the sums over all rows are complete.
  @pl.when(r == height + stencil.reach - 1)
  def _():
    dweights_ref[...] = jnp.sum(scratch.sums_ref[...], axis=1)
