"""The phases of `gpu_fused`'s kernel, each for one row of an image."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.structure_aware_ssm.gpu_share import (
  REACH,
  Program,
  Weights,
)
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.taps import clip, columns_read
from spatial_mamba_kernels.typing import Array

# Rows of the ring: a row of pixels, and those above it that it reads.
RING = REACH + 1


def _taps(offset, above):
  """Returns the taps of a row of states in a row of pixels, for `_add_row`.

  Args:
    offset: of the states from the row scanned last, 0 or less.
    above: how many rows above the row scanned last the pixels are.
  """
  in_row = STENCIL.by_row[offset + above]
  return [(column, (above, tap)) for column, tap in in_row]


# What a step adds, as (row of states, taps): first to the row of pixels that is
# then finished, with one other; then to the rest. All at once would take more
# registers than there are.
FINISHING = [(0, _taps(0, 5) + _taps(0, 3))]
GOING_ON = [(0, _taps(0, 1) + _taps(0, 0))]
GOING_ON += [(offset, _taps(offset, 0)) for offset in (-1, -3, -5)]


class Inputs(NamedTuple):
  """References to the kernel's inputs.

  `image_ref` is `u` or the cotangents of y, of which a row is loaded for each
  row of fused states. For the others see `Scanned.operands`.
  """

  u_ref: Any
  delta_ref: Any
  A_ref: Any
  B_ref: Any
  weights_ref: Any
  bias_ref: Any
  image_ref: Any


class Observation(NamedTuple):
  """References to C, [B, H, W], and D, [1, D]."""

  C_ref: Any
  D_ref: Any


class Outputs(NamedTuple):
  """References to the kernel's results; also their types.

  Attributes:
    result_ref: y, or the cotangents of C.
    saved_ref: the state after each row, [H, 1, B, D], or None.
  """

  result_ref: Any
  saved_ref: Any = None


class Scratch(NamedTuple):
  """References to the kernel's scratch; also its types.

  Attributes:
    loaded: barriers; a warpgroup's part of a row of u and delta is loaded.
    delta_row_ref: [warpgroups, columns, 128].
    image_loaded: the same of a row of the image.
    image_row_ref: [warpgroups, columns, 128], replaced by the row of y.
    kept_ref: see `Weights`.
    chained_ref: [2 * warpgroups, 128], what `Program.chain` takes.
    products_ref: [warpgroups, SUMMED, 128], or None.
    ring_ref: [RING, W, 128], rows of states.
    scanned: a barrier; all warpgroups have written to `chained_ref`.
    u_row_ref: [warpgroups, columns, 128].
    written: a barrier; all warpgroups have written their states to the ring.
  """

  loaded: Any
  delta_row_ref: Any
  image_loaded: Any
  image_row_ref: Any
  kept_ref: Any
  chained_ref: Any
  products_ref: Any
  ring_ref: Any
  scanned: Any
  u_row_ref: Any
  written: Any


class Walk(NamedTuple):
  """The phases of the kernel, and the references that they take.

  Attributes:
    program: what the warpgroup computes.
    inputs: see `Inputs`.
    observation: see `Observation`; None for `sum_products`.
    outputs: see `Outputs`.
    scratch: see `Scratch`.
  """

  program: Program
  inputs: Inputs
  observation: Any
  outputs: Outputs
  scratch: Scratch

  @property
  def weights(self) -> Weights:
    """The stencil's weights."""
    return Weights(
      self.inputs.weights_ref, self.scratch.kept_ref, self.program.channels
    )

  def fetch(self, row: Any) -> None:
    """Starts to load a row of u and delta."""
    image, warpgroup, _, channels, own = self.program[1:]
    for source_ref, rows_ref in (
      (self.inputs.u_ref, self.scratch.u_row_ref),
      (self.inputs.delta_ref, self.scratch.delta_row_ref),
    ):
      plgpu.copy_gmem_to_smem(
        source_ref.at[image, row, own, channels],
        rows_ref.at[warpgroup],
        self.scratch.loaded.at[warpgroup],
      )

  def fetch_image(self, row: Any) -> None:
    """Starts to load a row of the image."""
    image, warpgroup, _, channels, own = self.program[1:]
    # The row of y that was there has been copied out.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.copy_gmem_to_smem(
      self.inputs.image_ref.at[image, row, own, channels],
      self.scratch.image_row_ref.at[warpgroup],
      self.scratch.image_loaded.at[warpgroup],
    )

  def scan_row(self, row: Any, state: Array) -> Array:
    """Writes a row of states to the ring; returns the state after it."""
    program, scratch = self.program, self.scratch
    cut, warpgroup = program.cut, program.warpgroup

    # Scan this warpgroup's columns from zero.
    plgpu.barrier_wait(scratch.loaded.at[warpgroup])
    added, decays = self._scan_from_zero(row)
    gpu.commit()

    # All of the row is in registers: load the next one.
    @pl.when(row + 1 < self.inputs.u_ref.shape[1])
    def _():
      self.fetch(row + 1)

    # Get the state that the columns start from, by way of shared memory.
    decay_refs, added_refs = (
      scratch.chained_ref.at[pl.ds(cut.warpgroups * index, cut.warpgroups)]
      for index in range(2)
    )
    decay_refs[warpgroup], added_refs[warpgroup] = decays[-1], added[-1]
    cut.meet(scratch.scanned)
    before, state = program.chain(state, decay_refs, added_refs)

    # Write the states, and save the last one of the row.
    for j in range(cut.columns):
      scratch.ring_ref[row % RING, warpgroup * cut.columns + j] = (
        added[j] + decays[j] * before
      )
    saved_ref = self.outputs.saved_ref
    if saved_ref is not None:

      @pl.when(warpgroup == 0)
      def _():
        saved_ref[row, 0, program.image, program.channels] = state

    cut.meet(scratch.written)
    return state

  def _scan_from_zero(self, row):
    """Returns states from zero, and what remains there of another one."""
    program, inputs, scratch = self.program, self.inputs, self.scratch
    u_ref = scratch.u_row_ref.at[program.warpgroup]
    delta_ref = scratch.delta_row_ref.at[program.warpgroup]
    a = inputs.A_ref[0, program.channels]
    shift = inputs.bias_ref[0, program.channels]
    b_ref = inputs.B_ref.at[program.image, row, program.own]
    added, decays = [], []
    for j in range(program.cut.columns):
      dt = gpu.softplus(delta_ref[j].astype(jnp.float32) + shift)
      decay = jnp.exp(dt * a)
      drive = dt * u_ref[j].astype(jnp.float32) * b_ref[j]
      added.append(decay * added[-1] + drive if j else drive)
      decays.append(decay * decays[-1] if j else decay)
    return added, decays

  def add(self, pieces: Any, row: Any, sums: list[Any]) -> None:
    """Adds rows of states to rows of fused states.

    Args:
      pieces: `FINISHING` or `GOING_ON`.
      row: the row scanned last.
      sums: by rows above that one and by column, a vector, or None for zero;
        changed.
    """
    ring_ref, height = self.scratch.ring_ref, self.inputs.u_ref.shape[1]
    for offset, in_row in pieces:
      states_ref = ring_ref.at[clip(row + offset, height) % RING]
      weights = {tap: self.weights[tap] for _, (_, tap) in in_row}
      for j, readers in columns_read(in_row, self.program.cut.columns):
        value = _replicated(self.program, states_ref, j)
        for i, (above, tap) in readers:
          total = sums[above]
          total[i] = gpu.add(total[i], weights[tap] * value)


def _replicated(program, states_ref, j):
  """Returns column j of a row of states; beyond the image, the border's.

  It is chosen after loading, for `Program.read` loads another one there.
  """
  beyond = program.is_beyond(j)
  border = 0 if j < 0 else program.cut.columns - 1
  if beyond is True:
    return program.read(states_ref, border)
  value = program.read(states_ref, j)
  if beyond is False:
    return value
  return jnp.where(beyond, program.read(states_ref, border), value)


def observe(walk: Walk, row: Any, fused: list[Array]) -> None:
  """Replaces the row of u by y = C * fused + D * u, and sends it."""
  image, warpgroup, _, channels, own = walk.program[1:]
  x_ref, y_ref = walk.scratch.image_row_ref.at[warpgroup], walk.outputs[0]
  c_ref = walk.observation.C_ref.at[image, row, own]
  skip = walk.observation.D_ref[0, channels]
  for j, value in enumerate(fused):
    x = x_ref[j].astype(jnp.float32)
    x_ref[j] = (c_ref[j] * value + skip * x).astype(y_ref.dtype)
  gpu.commit()
  plgpu.copy_smem_to_gmem(x_ref, y_ref.at[image, row, own, channels])


def sum_products(walk: Walk, row: Any, fused: list[Array]) -> None:
  """Sums fused states times the row of cotangents over channels, for dC."""
  image, warpgroup, block, *_ = walk.program[1:]
  dy_ref, dC_ref = walk.scratch.image_row_ref.at[warpgroup], walk.outputs[0]
  values = [x * dy_ref[j].astype(jnp.float32) for j, x in enumerate(fused)]
  gpu.store_sums(
    values,
    walk.scratch.products_ref.at[warpgroup],
    dC_ref.at[block, image, row, warpgroup],
  )
