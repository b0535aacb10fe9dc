"""The structure-aware SSM as TPU kernels: one pass forward, one backward.

Forward, row r of an image is scanned while row r - 5 is fused and read out.
Backward, rows come from the last to the first: row r is scanned anew, from the
state that the forward pass left of the row above, while the cotangents of row
r + 5 are computed. See `tpu.rows` for how arrays lie.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels.dispatch import Arrays
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL, tpu_plan
from spatial_mamba_kernels.taps import clip
from spatial_mamba_kernels.tpu import fusion, rows, scan
from spatial_mamba_kernels.typing import Array

REACH, WINDOW = STENCIL.reach, STENCIL.window


def run_forward(arrays: Arrays, *, save: bool) -> Arrays:
  """The operator on one device, and if `save` each row's last states.

  They are [H, N, B, D].
  """
  cut = tpu_plan(arrays)
  batch = len(arrays[0])
  y, *saved = forward(*_lay_out(arrays, cut), save=save, cut=cut)
  return (
    rows.images_of(y, batch),
    *(rows.last_states_of(x, batch) for x in saved),
  )


def run_backward(arrays: Arrays, saved: Arrays, g: Array) -> Arrays:
  """Cotangents on one device; those of parameters as sums over some images.

  Returns:
    du, ddelta [B, H, W, D]; dB, dC [K, B, H, W, N], to be summed over K; and
    [G, T + N + 2, D], to be summed over G: of the merged weights, A,
    delta_bias and D.
  """
  cut = tpu_plan(arrays)
  du, ddelta, dB, dC, parameters = backward(
    *_lay_out(arrays, cut),
    rows.last_state_rows_of(saved[0], cut.group),
    rows.rows_of(g, cut.group),
    cut=cut,
  )
  batch, _, width, _ = g.shape
  tokens_of = jax.vmap(partial(rows.tokens_of, batch=batch, width=width))
  return (
    rows.images_of(du, batch),
    rows.images_of(ddelta, batch),
    tokens_of(dB),
    tokens_of(dC),
    parameters,
  )


def _lay_out(arrays, cut):
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  return (
    rows.rows_of(u, cut.group),
    rows.rows_of(delta, cut.group),
    A.astype(jnp.float32).T,
    rows.lane_rows_of(B, cut.group),
    rows.lane_rows_of(C, cut.group),
    D.astype(jnp.float32)[None],
    STENCIL.merge(kernels, alpha),
    bias.astype(jnp.float32)[None],
  )


def forward(u, delta, A, B, C, D, weights, bias, *, save, cut):
  """Returns y and, if `save`, the state that each row leaves, [H, N, G, b, D].

  u and delta are [H, W, G, b, D]; B and C [H, N, G, b, Wp]; A [N, D], weights
  [T, D], and D and bias [1, D], all float32.
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]

  def now(row):
    return jnp.minimum(row, height - 1)

  def lagging(row):
    return jnp.maximum(row - REACH, 0)

  image = partial(rows.image_spec, width, cut)
  tokens = partial(rows.token_spec, states, cut, B.shape[-1])
  arguments = (u, delta, B, C, A, D, weights, bias)
  out_specs = [image(lagging)]
  out_shape = [jax.ShapeDtypeStruct(u.shape, u.dtype)]
  if save:
    out_specs.append(rows.image_spec(states, cut, now))
    shape = (height, states, groups, group, channels)
    out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  return pl.pallas_call(
    partial(_forward_kernel, height=height),
    grid=(groups, -(-channels // cut.block), height + REACH),
    in_specs=[
      image(now),
      image(now),
      tokens(now),
      tokens(lagging),
      *(rows.parameter_spec(len(x), cut) for x in (A, D, weights, bias)),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[
      pltpu.VMEM((WINDOW, width, states, group, cut.block), jnp.float32),
      pltpu.VMEM((REACH + 1, width, group, cut.block), u.dtype),
      pltpu.VMEM((states, group, cut.block), jnp.float32),
    ],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments,
      out_shape,
      flops=4 + (7 + 2 * len(STENCIL.taps)) * states,
      transcendentals=2 + states,
    ),
    name="structure_aware_ssm_forward",
  )(*arguments)


def _forward_kernel(u, delta, B, C, A, D, weights, bias, y, *refs, height):
  *saved, ring, skip, carry = refs
  r = pl.program_id(2)
  width, _, channels = u.shape
  states = A.shape[0]

  @pl.when(r == 0)
  def _():
    carry[...] = jnp.zeros_like(carry)

  @pl.when(r < height)
  def _():
    skip[r % (REACH + 1)] = u[...]
    scan.scan_row(u, delta, A, B, bias, carry, ring.at[r % WINDOW])
    for out in saved:
      out[...] = carry[...]

  @pl.when(r >= REACH)
  def _():
    row = r - REACH
    x = skip.at[row % (REACH + 1)]
    slots = STENCIL.slots(row, height, WINDOW)

    def fuse(lanes):
      def tile(first, size, _):
        def observe(n, total):
          c = rows.columns_from(C[n].astype(jnp.float32), first)
          fused = fusion.fuse_tile(
            STENCIL, ring, slots, n, lanes, weights, first, size
          )
          return [
            t + c[:, j : j + 1] * f
            for j, (t, f) in enumerate(zip(total, fused, strict=True))
          ]

        total: list[Array] = [
          D[:, lanes] * x[first + j, :, lanes].astype(jnp.float32)
          for j in range(size)
        ]
        total = rows.for_states(states, observe, total)
        for j in range(size):
          y[first + j, :, lanes] = total[j].astype(y.dtype)

      rows.for_tiles(width, tile, None)

    rows.for_lanes(channels, fuse)


def backward(u, delta, A, B, C, D, weights, bias, saved, g, *, cut):
  """Cotangents of all that `forward` was given.

  Those of the parameters are sums over a group of images, those of B and C over
  a block of channels.

  Returns:
    du, ddelta [H, W, G, b, D]; dB, dC [K, H, N, G, b, Wp], K blocks; and
    [G, T + N + 2, D]: those of the weights, of A, the bias and D.
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]
  blocks = -(-channels // cut.block)

  def scanned(step):
    return jnp.maximum(height - 1 - step, 0)

  def above(step):
    return jnp.maximum(height - 2 - step, 0)

  def finished(step):
    return clip(height - 1 - step + REACH, height)

  image = partial(rows.image_spec, width, cut)
  tokens = partial(rows.token_spec, states, cut, B.shape[-1])
  dtokens = rows.partial_token_spec(states, cut, B.shape[-1], finished)
  sums = len(STENCIL.taps) + states + 2
  arguments = (u, delta, g, B, B, C, saved, A, D, weights, bias)
  results = [
    jax.ShapeDtypeStruct(u.shape, u.dtype),
    jax.ShapeDtypeStruct(u.shape, delta.dtype),
    jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32),
    jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32),
    jax.ShapeDtypeStruct((groups, sums, channels), jnp.float32),
  ]
  row = (width, states, group, cut.block)
  return pl.pallas_call(
    partial(_backward_kernel, height=height, channels=channels),
    grid=(groups, blocks, height + REACH),
    in_specs=[
      image(scanned),
      image(scanned),
      image(scanned),
      tokens(scanned),
      tokens(finished),
      tokens(scanned),
      rows.image_spec(states, cut, above),
      *(rows.parameter_spec(len(x), cut) for x in (A, D, weights, bias)),
    ],
    out_specs=[
      image(finished),
      image(finished),
      dtokens,
      dtokens,
      rows.sums_spec(sums, cut),
    ],
    out_shape=results,
    scratch_shapes=[
      pltpu.VMEM((WINDOW, *row), jnp.float32),
      pltpu.VMEM((STENCIL.cotangent_rows, *row), jnp.float32),
      *(
        pltpu.VMEM((REACH + 1, width, group, cut.block), x.dtype)
        for x in (u, delta, g)
      ),
      pltpu.VMEM(row, jnp.float32),
      pltpu.VMEM((states, group, cut.block), jnp.float32),
      pltpu.VMEM((states, group, cut.block), jnp.float32),
      pltpu.VMEM((sums, group, cut.block), jnp.float32),
    ],
    compiler_params=rows.COMPILER_PARAMS,
    cost_estimate=rows.cost(
      arguments,
      results,
      flops=12 + (26 + 6 * len(STENCIL.taps)) * states,
      transcendentals=5 + 2 * states,
    ),
    name="structure_aware_ssm_backward",
  )(*arguments)


def _backward_kernel(
  u, delta, g, B, B_finished, C, above, A, D, weights, bias,
  du, ddelta, dB, dC, dparams,
  ring, dring, us, deltas, gs, dh, carry, adjoint, sums,
  *, height, channels,
):  # fmt: skip
  s = pl.program_id(2)
  r = height - 1 - s
  row = r + REACH
  width, states = dh.shape[:2]
  inside = rows.inside(channels, u.shape[-1])
  cotangents = fusion.CotangentRing(STENCIL, dring, height)
  taps = len(STENCIL.taps)
  dweights, dscan = sums.at[pl.ds(0, taps)], sums.at[pl.ds(taps, states + 1)]
  dD = sums.at[taps + states + 1]

  @pl.when(s == 0)
  def _():
    adjoint[...] = jnp.zeros_like(adjoint)
    sums[...] = jnp.zeros_like(sums)
    cotangents.clear()

  @pl.when(r >= 0)
  def _():
    carry[...] = jnp.where(r > 0, above[...], 0)
    scan.scan_row(u, delta, A, B, bias, carry, ring.at[r % WINDOW])
    for copy, x in ((us, u), (deltas, delta), (gs, g)):
      copy[r % (REACH + 1)] = x[...]
    _observe_backward(u, g, C, dring.at[r % WINDOW], dD)

  @pl.when(row < height)
  def _():
    place = row % (REACH + 1)
    dy = gs.at[place]
    dB[...] = jnp.zeros_like(dB)
    dC[...] = jnp.zeros_like(dC)
    cotangents.add_border_rows(row)
    slots, sources = STENCIL.slots(row, height, WINDOW), cotangents.sources(row)
    before = ring.at[(row - 1) % WINDOW, width - 1]

    def finish(lanes):
      def skip(column):
        return D[:, lanes] * dy[column, :, lanes].astype(jnp.float32)

      _fuse_weights_backward(
        ring, slots, dring, dy, weights, dC, dweights, lanes, inside
      )
      fusion.states_backward(STENCIL, dring, sources, weights, dh, lanes)
      scan.scan_row_backward(
        us.at[place], deltas.at[place], A, B_finished, bias,
        ring.at[slots[0]], before, row > 0, dh, adjoint,
        du, ddelta, dB, dscan, lanes, inside, skip,
      )  # fmt: skip

    rows.for_lanes(u.shape[-1], finish)

  @pl.when(s == height + REACH - 1)
  def _():
    dparams[...] = jnp.sum(sums[...], axis=1)


def _observe_backward(u, g, C, dfused, dD):
  """C times the cotangent of y, and the cotangent of D."""
  width, _, channels = g.shape

  def observe(lanes):
    def tile(first, size, total):
      c = scan.columns(C, first)
      for j in range(size):
        dy = g[first + j, :, lanes].astype(jnp.float32)
        total += dy * u[first + j, :, lanes].astype(jnp.float32)
        for n in range(len(c)):
          dfused[first + j, n, :, lanes] = c[n][:, j : j + 1] * dy
      return total

    dD[:, lanes] = rows.for_tiles(width, tile, dD[:, lanes], states=C.shape[0])

  rows.for_lanes(channels, observe)


def _fuse_weights_backward(
  ring, slots, dring, g, weights, dC, sums, lanes, inside
):
  """Cotangents of C and of the stencil's weights, from one row of pixels."""
  _, width, states, *_ = ring.shape
  dfused = dring.at[slots[0]]

  def tile(first, size, _):
    def of_state(n, _):
      fused = fusion.weights_backward_tile(
        STENCIL, ring, slots, dfused, n, lanes, weights, sums, first, size
      )
      products = [
        g[first + j, :, lanes].astype(jnp.float32) * value
        for j, value in enumerate(fused)
      ]
      dC[n] += rows.lane_sums(products, first, dC.shape[1:], lanes, inside)

    rows.for_states(states, of_state, None)

  rows.for_tiles(width, tile, None)
