"""The phases of `gpu_backward`'s kernel, each for one row of an image."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.structure_aware_ssm.gpu_share import (
  REACH,
  Program,
  Weights,
)
from spatial_mamba_kernels.structure_aware_ssm.plans import STENCIL
from spatial_mamba_kernels.taps import (
  RowTaps,
  columns_read,
  sources,
)
from spatial_mamba_kernels.typing import Array

# Row offsets, with the one that has the most taps last: other orders take more
# registers than there are.
FARTHEST_FIRST = sorted(STENCIL.by_row, key=abs, reverse=True)
# Vectors that warpgroups exchange, of each of them; see `Scratch.exchanged`.
EXCHANGED = 4


class Inputs(NamedTuple):
  """References to the kernel's inputs; see `backward`, parameters [1, D]."""

  u_ref: Any
  delta_ref: Any
  A_ref: Any
  B_ref: Any
  C_ref: Any
  D_ref: Any
  weights_ref: Any
  bias_ref: Any
  saved_ref: Any
  dy_ref: Any


class Outputs(NamedTuple):
  """References to the kernel's results; also their types.

  Attributes:
    du_ref: [B, H, W, D].
    ddelta_ref: [B, H, W, D].
    dB_ref: [blocks, B, H, warpgroups, sums].
    sums_ref: [B, warpgroups, T + 3, D], of the weights, A, the bias and D.
  """

  du_ref: Any
  ddelta_ref: Any
  dB_ref: Any
  sums_ref: Any


class Scratch(NamedTuple):
  """References to the kernel's scratch.

  Attributes:
    loaded: barriers; a warpgroup's part of a row of u and delta is loaded.
    delta_rows_ref: [2, W, 128]; the one not in use is being loaded.
    dy_loaded: a barrier; a row of cotangents is loaded.
    first_dy_loaded: a barrier; so are all that the last row depends on.
    kept_ref: see `Weights`.
    exchanged_ref: [EXCHANGED * warpgroups, 128]; see `exchanged`.
    products_ref: [warpgroups, SUMMED, 128].
    dy_ring_ref: [window, W, 128], rows of cotangents of y.
    scanned: a barrier; all warpgroups have scanned their columns.
    scanned_back: the same of the reverse scan.
    u_rows_ref: as `delta_rows_ref`.
  """

  loaded: Any
  delta_rows_ref: Any
  dy_loaded: Any
  first_dy_loaded: Any
  kept_ref: Any
  exchanged_ref: Any
  products_ref: Any
  dy_ring_ref: Any
  scanned: Any
  scanned_back: Any
  u_rows_ref: Any

  def exchanged(self) -> list[Any]:
    """Returns references to what warpgroups exchange, [warpgroups, 128] each.

    These are the decay of a row's columns, the state that they add, the adjoint
    that they add in reverse, and the adjoint that comes from the row below.
    """
    warpgroups = len(self.exchanged_ref) // EXCHANGED
    return [
      self.exchanged_ref.at[pl.ds(warpgroups * index, warpgroups)]
      for index in range(EXCHANGED)
    ]


class Walk(NamedTuple):
  """The phases of the kernel, and what they take.

  Attributes:
    program: what the warpgroup computes.
    inputs: see `Inputs`.
    outputs: see `Outputs`.
    scratch: see `Scratch`.
    a: A, a vector of channels.
    shift: the bias, a vector of channels.
    a2: A / log(2), for exponentials to base 2.
  """

  program: Program
  inputs: Inputs
  outputs: Outputs
  scratch: Scratch
  a: Array
  shift: Array
  a2: Array

  @classmethod
  def of(
    cls, program: Program, inputs: Inputs, outputs: Outputs, scratch: Scratch
  ) -> "Walk":
    """Loads the parameters."""
    a = inputs.A_ref[0, program.channels]
    shift = inputs.bias_ref[0, program.channels]
    a2 = a * np.float32(np.log2(np.e))
    return cls(program, inputs, outputs, scratch, a, shift, a2)

  @property
  def weights(self) -> Weights:
    """The stencil's weights."""
    return Weights(
      self.inputs.weights_ref, self.scratch.kept_ref, self.program.channels
    )

  def _row_refs(self, row: Any) -> tuple[Any, Any]:
    """Returns references to a row of u and delta in shared memory."""
    own = self.program.own
    return (
      self.scratch.u_rows_ref.at[row % 2, own],
      self.scratch.delta_rows_ref.at[row % 2, own],
    )

  def fetch(self, row: Any) -> None:
    """Starts to load a row of u and delta."""
    image, warpgroup, _, channels, own = self.program[1:]
    for source_ref, row_ref in zip(
      (self.inputs.u_ref, self.inputs.delta_ref),
      self._row_refs(row),
      strict=True,
    ):
      plgpu.copy_gmem_to_smem(
        source_ref.at[image, row, own, channels],
        row_ref,
        self.scratch.loaded.at[warpgroup],
      )

  def fetch_dy(self, row: Any, barrier: Any) -> None:
    """Starts to load a row of cotangents of y, of all columns."""
    image, channels = self.program.image, self.program.channels
    plgpu.copy_gmem_to_smem(
      self.inputs.dy_ref.at[image, row, :, channels],
      self.scratch.dy_ring_ref.at[row % STENCIL.window],
      barrier,
    )

  def recompute(self, row: Any) -> "Recomputed":
    """Waits for a row, and recomputes its states."""
    cut, image, warpgroup, _, channels, own = self.program
    decays_ref, added_ref, *_ = self.scratch.exchanged()
    u_ref, delta_ref = self._row_refs(row)
    plgpu.barrier_wait(self.scratch.loaded.at[warpgroup])

    # Scan this warpgroup's columns from zero.
    state = self.inputs.saved_ref[jnp.maximum(row - 1, 0), 0, image, channels]
    state = jnp.where(row > 0, state, 0)
    b_ref = self.inputs.B_ref.at[image, row, own]
    dts, decays, drives = [], [], []
    for j in range(cut.columns):
      dts.append(gpu.softplus(delta_ref[j].astype(jnp.float32) + self.shift))
      decays.append(jnp.exp(dts[j] * self.a))
      drives.append(dts[j] * u_ref[j].astype(jnp.float32) * b_ref[j])
    product, total = decays[0], drives[0]
    for decay, drive in zip(decays[1:], drives[1:], strict=True):
      product, total = product * decay, total * decay + drive
    decays_ref[warpgroup], added_ref[warpgroup] = product, total
    cut.meet(self.scratch.scanned)

    # Scan them again, from the state that the warpgroups before leave.
    state, _ = self.program.chain(state, decays_ref, added_ref)
    states = [state]
    for decay, drive in zip(decays, drives, strict=True):
      states.append(decay * states[-1] + drive)
    return Recomputed(row, u_ref, delta_ref, dts, states)

  def transpose(
    self, row: Any, h: list[Array], dweights: list[Array]
  ) -> tuple[list[Array], list[Array]]:
    """Computes the cotangents of a row of states.

    Args:
      row: of the states.
      h: the states, by column.
      dweights: the accumulated cotangents of the weights.

    Returns:
      The cotangents of the states, and `dweights` with this row's part.
    """
    height = self.inputs.u_ref.shape[1]
    dh: list[Any] = [gpu.zeros() for _ in h]
    dweights = list(dweights)
    for offset in FARTHEST_FIRST:
      in_row = STENCIL.by_row[offset]
      weights = {tap: self.weights[tap] for _, tap in in_row}

      def add_row(source, carry, in_row=in_row, weights=weights):
        dy_ref = self.scratch.dy_ring_ref.at[source % STENCIL.window]
        c_ref = self.inputs.C_ref.at[self.program.image, source]
        reads = _Reads(self.program, dy_ref, c_ref, in_row, weights, h)
        dh, sums = carry
        return reads.add_borders(*reads.add(list(dh), dict(sums)))

      first, end = sources(row, offset, height)
      sums = {tap: dweights[tap] for tap in weights}
      dh, sums = lax.fori_loop(first, end, add_row, (dh, sums))
      for tap, total in sums.items():
        dweights[tap] = total
    return dh, dweights

  def scan_back_from_zero(
    self, dts: list[Array], dh: list[Array]
  ) -> tuple[list[Array], Any]:
    """Returns, by warpgroup, what `Program.chain` takes for the adjoint.

    The decays are those of `scan_row`; they are loaded before any warpgroup can
    be at the next row and overwrite them.
    """
    cut, warpgroup = self.program.cut, self.program.warpgroup
    decays_ref, _, back_ref, _ = self.scratch.exchanged()
    total = gpu.zeros()
    for j in reversed(range(cut.columns)):
      total = jnp.exp2(dts[j] * self.a2) * (dh[j] + total)
    back_ref[warpgroup] = total
    return [decays_ref[other] for other in range(cut.warpgroups)], back_ref

  def scan_back(
    self,
    recomputed: "Recomputed",
    dh: list[Array],
    adjoint_after: Array,
    totals: tuple[Array, Array, Array],
  ) -> tuple[Array, Array, Array]:
    """Writes a row's cotangents, from its last column to its first.

    Args:
      recomputed: the row.
      dh: cotangents of the states by column.
      adjoint_after: the adjoint that comes from the columns after these.
      totals: the accumulated cotangents of A, the bias and D.

    Returns:
      `totals` with this row's part.
    """
    cut, image, warpgroup, block, channels, own = self.program
    row, u_ref, delta_ref, dts, states = recomputed
    b_ref = self.inputs.B_ref.at[image, row, own]
    dy_ref = self.scratch.dy_ring_ref.at[row % STENCIL.window, own]
    dA, dbias, dD = totals
    products: list[Any] = [None] * cut.columns

    # The cotangents of u and delta replace these.
    for j in reversed(range(cut.columns)):
      adjoint = dh[j] + adjoint_after
      adjoint_after = jnp.exp2(dts[j] * self.a2) * adjoint
      x = u_ref[j].astype(jnp.float32)
      g = dy_ref[j].astype(jnp.float32)
      ddecay = adjoint_after * states[j]
      drive = adjoint * b_ref[j]
      draw = (ddecay * self.a + drive * x) * gpu.sigmoid(
        delta_ref[j].astype(jnp.float32) + self.shift
      )
      dA, dbias, dD = dA + ddecay * dts[j], dbias + draw, dD + g * x
      products[j] = adjoint * (dts[j] * x)
      dx = drive * dts[j] + self.inputs.D_ref[0, channels] * g
      u_ref[j] = dx.astype(u_ref.dtype)
      delta_ref[j] = draw.astype(delta_ref.dtype)

    # Sum over channels for B, and send the row.
    gpu.store_sums(
      products,
      self.scratch.products_ref.at[warpgroup],
      self.outputs.dB_ref.at[block, image, row, warpgroup],
    )
    gpu.commit()
    for row_ref, target_ref in (
      (u_ref, self.outputs.du_ref),
      (delta_ref, self.outputs.ddelta_ref),
    ):
      plgpu.copy_smem_to_gmem(row_ref, target_ref.at[image, row, own, channels])
    return dA, dbias, dD


class Recomputed(NamedTuple):
  """A row of states, and what they were computed from.

  Attributes:
    row: of the image.
    u_ref: [columns, 128] in shared memory, later replaced by `du`.
    delta_ref: [columns, 128], later replaced by `ddelta`.
    dts: time steps by column.
    states: the state before each column, then the last one.
  """

  row: Any
  u_ref: Any
  delta_ref: Any
  dts: list[Array]
  states: list[Array]


class _Reads(NamedTuple):
  """What a row of fused states reads of a row of states.

  Attributes:
    program: what the warpgroup computes.
    dy_ref: [W, 128], the cotangents of the fused row's observation.
    c_ref: [W], its C.
    in_row: the taps in the row of states, (column offset, tap).
    weights: {tap: weight}.
    h: the states, by column.
  """

  program: Program
  dy_ref: Any
  c_ref: Any
  in_row: RowTaps
  weights: dict[int, Array]
  h: list[Array]

  def _column(self, j):
    """Returns the cotangent of fused column j; beyond the image None or 0."""
    beyond = self.program.is_beyond(j)
    if beyond is True:
      return None
    c, dy = (self.program.read(ref, j) for ref in (self.c_ref, self.dy_ref))
    value = c * dy.astype(jnp.float32)
    return value if beyond is False else jnp.where(beyond, 0, value)

  def add(
    self, dh: list[Array], sums: dict[int, Array]
  ) -> tuple[list[Array], dict[int, Array]]:
    """Adds the part of states within the image to `dh` and the weights'."""
    transposed = [(-offset, tap) for offset, tap in self.in_row]
    for source, readers in columns_read(transposed, len(self.h)):
      value = self._column(source)
      if value is not None:
        for j, tap in readers:
          dh[j] += self.weights[tap] * value
          sums[tap] += self.h[j] * value
    return dh, sums

  def add_borders(
    self, dh: list[Array], sums: dict[int, Array]
  ) -> tuple[list[Array], dict[int, Array]]:
    """Adds the part of replicas beyond the image to its border columns."""
    cut, warpgroup = self.program.cut, self.program.warpgroup
    for side, border in ((-1, 0), (1, cut.columns - 1)):
      at_border = warpgroup == (0 if side < 0 else cut.warpgroups - 1)
      beyond = [tap for tap in self.in_row if tap[0] * side > 0]

      def fold(_, carry, side=side, border=border, beyond=beyond):
        # Load them again, for there are no registers to keep them.
        pixels: list[Any] = [
          self._column(border - side * k) for k in range(min(REACH, cut.width))
        ]
        dh, sums = carry
        sums = dict(sums)
        for offset, tap in beyond:
          folded = sum(pixels[1 : abs(offset)], pixels[0])
          dh += self.weights[tap] * folded
          sums[tap] += self.h[border] * folded
        return dh, sums

      carry = dh[border], {tap: sums[tap] for _, tap in beyond}
      times = at_border.astype(jnp.int32)
      dh[border], folded = lax.fori_loop(0, times, fold, carry)
      sums |= folded
    return dh, sums
