"""The structure-aware SSM's backward pass but for C, as one GPU kernel.

`gpu_fused` computes the cotangents of C. This kernel goes up an image, with a
row of cotangents of y for each row that reads the present one in a ring in
shared memory. For a row it

1. recomputes the states, from the state that the forward pass saved;
2. transposes the fusion: each row of the ring is read once, for the cotangents
   of the states and of the weights;
3. scans the cotangents of the states from the row's end to its beginning, and
   writes those of u and delta in place of the row's u and delta.

The warpgroups of a program share the row's columns; see `gpu_share`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.structure_aware_ssm import gpu_share
from spatial_mamba_kernels.structure_aware_ssm.gpu_backward_row import (
  EXCHANGED,
  Inputs,
  Outputs,
  Scratch,
  Walk,
)
from spatial_mamba_kernels.structure_aware_ssm.gpu_share import (
  REACH,
  SUMMED,
  VECTOR_BYTES,
  Program,
  Scanned,
  Share,
  Weights,
)
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.typing import Array


def share(shape: tuple[int, ...], image: Any, delta: Any) -> Share:
  """Returns how the kernel shares columns.

  Args:
    shape: of the images, [B, H, W, D].
    image: type of the images.
    delta: type of the time steps.

  Raises:
    NotImplementedError: see `gpu_share.share`.
  """
  image, delta = (jnp.dtype(x).itemsize for x in (image, delta))

  def bytes_of(width, warpgroups):
    loaded = STENCIL.window * image, 2 * image, 2 * delta
    rows = [width * gpu.CHANNELS * size for size in loaded]
    vectors = [
      warpgroups * VECTOR_BYTES * count for count in (EXCHANGED, SUMMED)
    ]
    return rows + vectors

  return gpu_share.share(shape, bytes_of)


def backward(
  scanned: Scanned, C: Array, D: Array, saved: Array, dy: Array
) -> tuple[Array, ...]:
  """Returns the cotangents of all arguments of `gpu_fused.forward` but C.

  Args:
    scanned: as for `gpu_fused.forward`.
    C: [B, H, W].
    D: [D].
    saved: [H, 1, B, D], the state after each row.
    dy: [B, H, W, D], the cotangents of y.

  Returns:
    du, ddelta [B, H, W, D]; dB [K, B, H, W], to be summed over K; and those of
    the weights, [G, T, D], and of A, the bias and D, [G, 3, D], to be summed
    over G.
  """
  u, delta = scanned.u, scanned.delta
  cut = share(u.shape, u.dtype, delta.dtype)
  taps, channels = scanned.weights.shape
  u, delta, A, B, weights, bias = scanned.operands()
  inputs = Inputs(
    u,
    delta,
    A,
    B,
    C.astype(jnp.float32),
    gpu.parameters(D[None]),
    weights,
    bias,
    gpu.parameters(saved),
    gpu.pad_channels(dy),
  )
  (outputs,) = gpu.kernel(
    partial(_kernel, cut=cut),
    name="structure_aware_ssm_backward",
    out_type=(_results(inputs, cut),),
    scratch_types=(_scratch(inputs, cut),),
    grid=(len(u), gpu.blocks(channels)),
    grid_names=("image", "block"),
    num_threads=cut.warpgroups,
    thread_name="warpgroup",
  )(inputs)
  du, ddelta, dB, sums = outputs
  sums = sums.reshape(-1, *sums.shape[2:])[..., :channels]
  return (
    du[..., :channels],
    ddelta[..., :channels],
    cut.of_columns(dB),
    sums[:, :taps],
    sums[:, taps:],
  )


def _results(inputs, cut):
  """Returns the types of the kernel's results."""
  batch, height, *_ = inputs.u_ref.shape
  taps, channels = inputs.weights_ref.shape
  return Outputs(
    du_ref=cut.result(inputs.u_ref, inputs.u_ref.dtype),
    ddelta_ref=cut.result(inputs.u_ref, inputs.delta_ref.dtype),
    dB_ref=jax.ShapeDtypeStruct(
      (gpu.blocks(channels), batch, height, cut.warpgroups, cut.sums),
      jnp.float32,
    ),
    sums_ref=jax.ShapeDtypeStruct(
      (batch, cut.warpgroups, taps + 3, channels), jnp.float32
    ),
  )


def _scratch(inputs, cut):
  """Returns the types of the kernel's scratch."""
  rows, warpgroups = (2, cut.width, gpu.CHANNELS), cut.warpgroups
  height = inputs.u_ref.shape[1]
  return Scratch(
    loaded=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
    delta_rows_ref=plgpu.SMEM(rows, inputs.delta_ref.dtype),
    dy_loaded=plgpu.Barrier(),
    first_dy_loaded=plgpu.Barrier(num_arrivals=min(REACH + 1, height)),
    kept_ref=Weights.scratch(cut.kept),
    exchanged_ref=plgpu.SMEM(
      (EXCHANGED * warpgroups, gpu.CHANNELS), jnp.float32
    ),
    products_ref=plgpu.SMEM((warpgroups, SUMMED, gpu.CHANNELS), jnp.float32),
    dy_ring_ref=plgpu.SMEM((STENCIL.window, *rows[1:]), inputs.dy_ref.dtype),
    scanned=plgpu.Barrier(num_arrivals=warpgroups),
    scanned_back=plgpu.Barrier(num_arrivals=warpgroups),
    u_rows_ref=plgpu.SMEM(rows, inputs.u_ref.dtype),
  )


def _kernel(inputs: Inputs, outputs: Outputs, scratch: Scratch, *, cut):
  program = Program.this(cut)
  walk = Walk.of(program, inputs, outputs, scratch)
  height, warpgroup = inputs.u_ref.shape[1], program.warpgroup

  def step(i, carry):
    row = height - 1 - i
    totals, dweights = carry

    # Recompute the states. Then the row above may be loaded, in the place of
    # the row below, whose cotangents have been sent.
    recomputed = walk.recompute(row)

    @pl.when(row > 0)
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      walk.fetch(row - 1)

    # Transpose the fusion, once the farthest row of cotangents is loaded.
    @pl.when((row >= REACH) & (i > 0))
    def _():
      plgpu.barrier_wait(scratch.dy_loaded)

    dh, dweights = walk.transpose(row, recomputed.states[1:], dweights)

    # Scan in reverse: first for the adjoint that the columns start from. Then
    # all warpgroups have read the ring, and its last row may be replaced.
    decays, added = walk.scan_back_from_zero(recomputed.dts, dh)
    gpu.commit()
    cut.meet(scratch.scanned_back)

    @pl.when((warpgroup == 0) & (row > REACH))
    def _():
      walk.fetch_dy(row - REACH - 1, scratch.dy_loaded)

    adjoint_ref = scratch.exchanged()[-1]
    adjoint, adjoint_ref[warpgroup] = program.chain(
      adjoint_ref[warpgroup], decays, added, reverse=True
    )

    # Then from that adjoint, for all cotangents that depend on it.
    totals = walk.scan_back(recomputed, dh, adjoint, totals)
    return totals, dweights

  # Load the last row, the cotangents that it depends on, and the weights.
  walk.fetch(height - 1)

  @pl.when(warpgroup == 0)
  def _():
    for row in range(max(height - 1 - REACH, 0), height):
      walk.fetch_dy(row, scratch.first_dy_loaded)
    walk.weights.load()

  scratch.exchanged()[-1][warpgroup] = gpu.zeros()
  cut.meet(scratch.scanned)
  plgpu.barrier_wait(scratch.first_dy_loaded)

  # Go up the image; then store what has been summed over it.
  zeros = [gpu.zeros() for _ in range(inputs.weights_ref.shape[0])]
  carry = (gpu.zeros(), gpu.zeros(), gpu.zeros()), zeros
  totals, dweights = lax.fori_loop(0, height, step, carry)
  for index, total in enumerate((*dweights, *totals)):
    outputs.sums_ref[program.image, warpgroup, index, program.channels] = total
  plgpu.wait_smem_to_gmem(0)
