"""The structure-aware SSM's forward pass as one GPU kernel.

A program takes an image for 128 channels; its warpgroups share the columns. Row
r is scanned by all of them at once, each from a state of zero; what each adds
and how much it lets decay says what the others begin with. Of the rows that a
row of pixels reads, those above come from a ring in shared memory when the row
itself has been scanned; those below are added as they come, to sums that stay
in registers. A ring of all eleven rows would not fit at 56 x 56.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels import gpu_threads as gpu
from spatial_mamba_kernels.gpu_device import device
from spatial_mamba_kernels.gpu_threads import plgpu
from spatial_mamba_kernels.state_fusion.taps import (
  Stencil,
  clip,
  columns_read,
)
from spatial_mamba_kernels.state_fusion.xla import DILATIONS

STENCIL = Stencil(DILATIONS)
REACH = STENCIL.reach
# Rows above a row of pixels, and itself.
RING = REACH + 1


def _taps(offset, above):
  """Taps of the row at `offset` from the one that has come, for `_add`.

  Args:
    offset: 0 or less.
    above: how many rows above the one that has come the pixels are.
  """
  in_row = STENCIL.by_row[offset + above]
  return [(column, (above, place)) for column, place in in_row]


# What a row that has come, and those above it, give to the rows of pixels that
# go on, and before that to those of which one is then finished: together they
# would take more registers than there are.
FINISHING = [(0, _taps(0, 5) + _taps(0, 3))]
GOING_ON = [(0, _taps(0, 1) + _taps(0, 0))]
GOING_ON += [(offset, _taps(offset, 0)) for offset in (-1, -3, -5)]
# A warpgroup's columns, for each of which a thread keeps 5 sums in registers:
# with 4 warpgroups it has 128 of these.
MOST_COLUMNS = 14
MOST_WARPGROUPS = 4
# Of barriers, of which there are ten at most.
BARRIER_BYTES = 10 * 8


@dataclasses.dataclass(frozen=True)
class Share:
  """How the warpgroups of a program share an image's columns.

  Attributes:
    warpgroups: in a program.
    columns: of each.
  """

  warpgroups: int
  columns: int


def share(shape: tuple[int, ...], image: Any, delta: Any) -> Share:
  """For images [B, H, W, D] of this type, with time steps of that one.

  Raises:
    NotImplementedError: the rows do not fit into registers and shared memory,
      there are too few images to keep a GPU busy, or no TMA copies rows.
  """
  tma, smem_bytes = device()
  if not tma:
    raise NotImplementedError("rows are copied by a TMA")
  batch, _, width, channels = shape
  if batch * gpu.blocks(channels) < gpu.CONFIG.programs // 2:
    raise NotImplementedError("too few programs")
  for warpgroups in range(1, MOST_WARPGROUPS + 1):
    columns, rest = divmod(width, warpgroups)
    if rest or columns > MOST_COLUMNS:
      continue
    if warpgroups == 1 or columns >= REACH:
      row = width * gpu.CHANNELS
      come = 2 * jnp.dtype(image).itemsize + jnp.dtype(delta).itemsize
      numbers = _numbers(warpgroups) * gpu.CHANNELS * 4
      if row * (RING * 4 + come) + numbers <= smem_bytes - BARRIER_BYTES:
        return Share(warpgroups, columns)
  raise NotImplementedError(f"rows of {width} pixels do not fit")


def _numbers(warpgroups):
  """Vectors shared: of each warpgroup two, and all weights but the last.

  With the last one, at 56 x 56, it would be half a KiB too much.
  """
  return 2 * warpgroups + len(STENCIL.taps) - 1


def forward(u, delta, A, B, C, D, weights, bias, *, save):
  """The operator, and if `save` the state that each row leaves, [H, 1, B, D].

  Args:
    u: [B, H, W, D].
    delta: [B, H, W, D].
    A: [D].
    B: [B, H, W].
    C: [B, H, W].
    D: [D].
    weights: [T, D].
    bias: [D].
    save: see above.
  """
  batch, height, _, channels = u.shape
  cut = share(u.shape, u.dtype, delta.dtype)
  group = (cut.warpgroups,)
  columns = (cut.columns, gpu.CHANNELS)
  image = gpu.pad_channels(u)
  results = [jax.ShapeDtypeStruct(image.shape, u.dtype)]
  if save:
    padded = gpu.blocks(channels) * gpu.CHANNELS
    shape = (height, 1, batch, padded)
    results.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  y, *saved = gpu.kernel(
    partial(_kernel, cut=cut),
    name="structure_aware_ssm_forward",
    out_type=results,
    scratch_types={
      "ring": plgpu.SMEM((RING, u.shape[2], gpu.CHANNELS), jnp.float32),
      "numbers": plgpu.SMEM(
        (_numbers(cut.warpgroups), gpu.CHANNELS), jnp.float32
      ),
      "u_row": plgpu.SMEM((*group, *columns), u.dtype),
      "delta_row": plgpu.SMEM((*group, *columns), delta.dtype),
      "y_row": plgpu.SMEM((*group, *columns), u.dtype),
      "come": plgpu.Barrier(num_arrivals=2, num_barriers=cut.warpgroups),
      "skip_come": plgpu.Barrier(num_barriers=cut.warpgroups),
      "scanned": plgpu.Barrier(num_arrivals=cut.warpgroups),
      "written": plgpu.Barrier(num_arrivals=cut.warpgroups),
    },
    grid=(batch, gpu.blocks(channels)),
    grid_names=("image", "block"),
    num_threads=cut.warpgroups,
    thread_name="warpgroup",
  )(
    image,
    gpu.pad_channels(delta),
    gpu.parameters(A[None]),
    B.astype(jnp.float32),
    C.astype(jnp.float32),
    gpu.parameters(D[None]),
    gpu.parameters(weights),
    gpu.parameters(bias[None]),
  )
  return y[..., :channels], *(x[..., :channels] for x in saved)


def _kernel(
  u, delta, A, B, C, D, weights, bias, y, *saved, cut, ring, numbers,
  u_row, delta_row, y_row, come, skip_come, scanned, written,
):  # fmt: skip
  image, me = lax.axis_index("image"), lax.axis_index("warpgroup")
  block = lax.axis_index("block")
  channels = pl.ds(block * gpu.CHANNELS, gpu.CHANNELS)
  height = u.shape[1]
  first, size = me * cut.columns, cut.columns
  own = pl.ds(first, size)
  u_row, delta_row, y_row = u_row.at[me], delta_row.at[me], y_row.at[me]
  taps = numbers.at[pl.ds(2 * cut.warpgroups, weights.shape[0] - 1)]

  def meet(barrier):
    """Waits for all warpgroups."""
    if cut.warpgroups > 1:
      plgpu.barrier_arrive(barrier)
      plgpu.barrier_wait(barrier)

  def fetch(row):
    for source, target in ((u, u_row), (delta, delta_row)):
      plgpu.copy_gmem_to_smem(
        source.at[image, row, own, channels], target, come.at[me]
      )

  def scan_row(row, state):
    """Scans this warpgroup's columns; returns the state after the row."""
    plgpu.barrier_wait(come.at[me])
    a, shift = A[0, channels], bias[0, channels]
    b = B.at[image, row, own]
    # From a state of zero: the states, and what would be left of another one.
    added, left = [], []
    for j in range(size):
      dt = gpu.softplus(delta_row[j].astype(jnp.float32) + shift)
      decay = jnp.exp(dt * a)
      drive = dt * u_row[j].astype(jnp.float32) * b[j]
      added.append(decay * added[-1] + drive if j else drive)
      left.append(decay * left[-1] if j else decay)
    gpu.commit()

    @pl.when(row + 1 < height)
    def _():
      fetch(row + 1)

    numbers[2 * me], numbers[2 * me + 1] = left[-1], added[-1]
    meet(scanned)
    before = state
    for other in range(cut.warpgroups):
      before = jnp.where(me == other, state, before)
      state = numbers[2 * other] * state + numbers[2 * other + 1]
    for j in range(size):
      ring[row % RING, first + j] = added[j] + left[j] * before
    for out in saved:

      @pl.when(me == 0)
      def _(out=out):
        out[row, 0, image, channels] = state

    meet(written)
    return state

  def step(row, carry):
    state, *sums = carry
    state = lax.cond(
      row < height, lambda x: scan_row(row, x), lambda x: x, state
    )
    done = row - REACH

    @pl.when(done >= 0)
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      plgpu.copy_gmem_to_smem(
        u.at[image, done, own, channels], y_row, skip_come.at[me]
      )

    sums = [[None] * size, *map(list, sums)]

    def add(pieces):
      last_tap = weights.at[weights.shape[0] - 1, channels]
      for offset, in_row in pieces:
        column = _columns(ring.at[clip(row + offset, height) % RING], cut, me)
        _add(column, in_row, (taps, last_tap), sums, size)

    add(FINISHING)
    finished = sums.pop()

    @pl.when(done >= 0)
    def _():
      plgpu.barrier_wait(skip_come.at[me])
      c, skip = C.at[image, done, own], D[0, channels]
      for j in range(size):
        x = y_row[j].astype(jnp.float32)
        y_row[j] = (c[j] * finished[j] + skip * x).astype(y.dtype)
      gpu.commit()
      plgpu.copy_smem_to_gmem(y_row, y.at[image, done, own, channels])

    add(GOING_ON)
    return state, *sums

  fetch(0)

  @pl.when(me == 0)
  def _():
    for t in range(taps.shape[0]):
      taps[t] = weights[t, channels]

  meet(written)
  nothing = [[gpu.zeros() for _ in range(size)] for _ in range(REACH)]
  lax.fori_loop(0, height + REACH, step, (gpu.zeros(), *nothing))
  plgpu.wait_smem_to_gmem(0)


def _columns(states, cut, me):
  """Reads what this warpgroup's columns read, of a row [W, D].

  Beyond the image it is what the border is: chosen after loading, so that three
  addresses are enough and not one for each column.

  Returns:
    Function from the distance to the first column to a vector.
  """
  size = cut.columns
  width = cut.warpgroups * size
  first = me * size if cut.warpgroups > 1 else 0
  own = states.at[pl.ds(first, size)]

  def column(j):
    if 0 <= j < size:
      return own[j]
    border = 0 if j < 0 else size - 1
    if cut.warpgroups == 1:
      return own[border]
    if j < 0:
      beyond, start = me == 0, jnp.maximum(first - REACH, 0)
      inside = states.at[pl.ds(start, REACH)][j + REACH]
    else:
      beyond, start = me == cut.warpgroups - 1, first + size
      start = jnp.minimum(start, width - REACH)
      inside = states.at[pl.ds(start, REACH)][j - size]
    return jnp.where(beyond, own[border], inside)

  return column


def _add(column, in_row, taps, sums, size):
  """Adds what a row of states gives to rows of pixels.

  Args:
    column: see `_columns`.
    in_row: [(column offset, (which of `sums`, place among the weights))].
    taps: the weights: a reference to [T - 1, D], and one to the last one, [D].
    sums: for each row of pixels and each of its columns a vector, or None where
      there is none yet. Changed.
    size: columns of a row.
  """
  most_taps, last_tap = taps
  weights = {
    place: most_taps[place] if place < most_taps.shape[0] else last_tap[...]
    for _, (_, place) in in_row
  }
  for j, readers in columns_read(in_row, size):
    value = column(j)
    for i, (target, place) in readers:
      total = sums[target]
      total[i] = gpu.add(total[i], weights[place] * value)
