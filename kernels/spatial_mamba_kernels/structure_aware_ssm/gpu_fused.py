"""The structure-aware SSM's walk down an image, as one GPU kernel.

Forward it gives the operator's result; backward, the cotangents of C, which
take the fused states anew. The warpgroups of a program scan row r at once, each
its columns (see `gpu_share`), from a state of zero; what each adds and how much
it lets decay says what the others begin with. Of the rows that a row of pixels
reads, those above come from a ring in shared memory when the row itself has
been scanned; those below are added as they come, to sums that stay in
registers. A ring of all eleven rows would not fit at 56 x 56.
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
from spatial_mamba_kernels.structure_aware_ssm.gpu_share import (
  REACH,
  STENCIL,
  SUMMED,
  VECTOR_BYTES,
  Share,
  Weights,
)
from spatial_mamba_kernels.taps import clip, columns_read

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


def share(
  shape: tuple[int, ...], image: Any, delta: Any, *, products: int = 0
) -> Share:
  """For images [B, H, W, D] of this type, with time steps of that one.

  Args:
    shape: of the images.
    image: type of them, and of what is observed with them.
    delta: type of the time steps.
    products: of how many columns a warpgroup sums products over channels.

  Raises:
    NotImplementedError: see `gpu_share.share`.
  """
  come = [jnp.dtype(x).itemsize for x in (image, delta, image)]

  def bytes_of(width, warpgroups):
    rows = [width * gpu.CHANNELS * size for size in (RING * 4, *come)]
    numbers = [warpgroups * VECTOR_BYTES * count for count in (2, products)]
    return rows + numbers

  return gpu_share.share(shape, bytes_of)


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
  results = [cut.result(gpu.pad_channels(u), u.dtype)]
  if save:
    padded = gpu.blocks(channels) * gpu.CHANNELS
    shape = (height, 1, batch, padded)
    results.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  y, *saved = _walk(
    _observe,
    (u, delta, A, B, weights, bias),
    u,
    (C.astype(jnp.float32), gpu.parameters(D[None])),
    results,
    cut,
    name="structure_aware_ssm_forward",
  )
  return y[..., :channels], *(x[..., :channels] for x in saved)


def observation_backward(u, delta, A, B, weights, bias, dy):
  """The cotangents of C, [K, B, H, W], to be summed over K.

  Args:
    u: [B, H, W, D], as for `forward`, like all up to the bias.
    delta: [B, H, W, D].
    A: [D].
    B: [B, H, W].
    weights: [T, D].
    bias: [D].
    dy: [B, H, W, D], the cotangents of what `forward` gives.
  """
  batch, height, _, channels = u.shape
  cut = share(u.shape, u.dtype, delta.dtype, products=SUMMED)
  shape = (gpu.blocks(channels), batch, height, cut.warpgroups, cut.sums)
  dC = _walk(
    _sum,
    (u, delta, A, B, weights, bias),
    dy,
    (),
    jax.ShapeDtypeStruct(shape, jnp.float32),
    cut,
    name="structure_aware_ssm_observation_backward",
    scratch={
      "products": plgpu.SMEM(
        (cut.warpgroups, SUMMED, gpu.CHANNELS), jnp.float32
      )
    },
  )
  return cut.of_columns(dC)


def _walk(finish, scanned, image, others, results, cut, *, name, scratch=None):
  """Runs the kernel.

  Args:
    finish: what becomes of fused states: `_observe` or `_sum`.
    scanned: (u, delta, A, B, weights, bias), as for `forward`.
    image: [B, H, W, D], whose row comes along with a row of fused states.
    others: what else `finish` reads.
    results: shapes and types.
    cut: see `Share`.
    name: of the kernel.
    scratch: what `finish` needs.
  """
  u, delta, A, B, weights, bias = scanned
  rows = (cut.warpgroups, cut.columns, gpu.CHANNELS)
  return gpu.kernel(
    partial(_kernel, finish=finish, cut=cut, others=len(others)),
    name=name,
    out_type=results,
    scratch_types={
      "ring": plgpu.SMEM((RING, cut.width, gpu.CHANNELS), jnp.float32),
      "numbers": plgpu.SMEM((2 * cut.warpgroups, gpu.CHANNELS), jnp.float32),
      **Weights.scratch(cut.kept),
      "u_row": plgpu.SMEM(rows, u.dtype),
      "delta_row": plgpu.SMEM(rows, delta.dtype),
      "image_row": plgpu.SMEM(rows, image.dtype),
      "come": plgpu.Barrier(num_arrivals=2, num_barriers=cut.warpgroups),
      "image_come": plgpu.Barrier(num_barriers=cut.warpgroups),
      "scanned": plgpu.Barrier(num_arrivals=cut.warpgroups),
      "written": plgpu.Barrier(num_arrivals=cut.warpgroups),
      **(scratch or {}),
    },
    grid=(len(u), gpu.blocks(u.shape[-1])),
    grid_names=("image", "block"),
    num_threads=cut.warpgroups,
    thread_name="warpgroup",
  )(
    gpu.pad_channels(u),
    gpu.pad_channels(delta),
    gpu.parameters(A[None]),
    B.astype(jnp.float32),
    gpu.parameters(weights),
    gpu.parameters(bias[None]),
    gpu.pad_channels(image),
    *others,
  )


def _kernel(
  u, delta, A, B, weights, bias, along, *refs, finish, cut, others,
  ring, numbers, u_row, delta_row, image_row, come, image_come, scanned,
  written, kept=None, **scratch,
):  # fmt: skip
  refs, (result, *saved) = refs[:others], refs[others:]
  image, me = lax.axis_index("image"), lax.axis_index("warpgroup")
  block = lax.axis_index("block")
  channels = pl.ds(block * gpu.CHANNELS, gpu.CHANNELS)
  height = u.shape[1]
  size, own = cut.columns, cut.own(me)
  u_row, delta_row, image_row = (
    rows.at[me] for rows in (u_row, delta_row, image_row)
  )
  taps = Weights(weights, kept, channels)
  all_left, all_added = (
    numbers.at[pl.ds(cut.warpgroups * place, cut.warpgroups)]
    for place in range(2)
  )

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

    all_left[me], all_added[me] = left[-1], added[-1]
    cut.meet(scanned)
    before, state = cut.hand_on(state, all_left, all_added, me)
    for j in range(size):
      ring[row % RING, me * size + j] = added[j] + left[j] * before
    for out in saved:

      @pl.when(me == 0)
      def _(out=out):
        out[row, 0, image, channels] = state

    cut.meet(written)
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
        along.at[image, done, own, channels], image_row, image_come.at[me]
      )

    sums = [[None] * size, *map(list, sums)]

    def add(pieces):
      for offset, in_row in pieces:
        states = ring.at[clip(row + offset, height) % RING]
        _add(partial(_column, states, cut, me), in_row, taps, sums, size)

    add(FINISHING)
    finished = sums.pop()

    @pl.when(done >= 0)
    def _():
      plgpu.barrier_wait(image_come.at[me])
      place = image, done, own, channels
      finish(finished, image_row, *refs, result, place, me, block, **scratch)

    add(GOING_ON)
    return state, *sums

  fetch(0)
  pl.when(me == 0)(taps.load)
  cut.meet(written)
  nothing = [[gpu.zeros() for _ in range(size)] for _ in range(REACH)]
  lax.fori_loop(0, height + REACH, step, (gpu.zeros(), *nothing))
  plgpu.wait_smem_to_gmem(0)


def _observe(fused, row, C, D, y, place, me, block):
  """C * fused + D * u, in place of the row of `u`."""
  del me, block
  *pixels, channels = place
  c, skip = C.at[*pixels], D[0, channels]
  for j, value in enumerate(fused):
    x = row[j].astype(jnp.float32)
    row[j] = (c[j] * value + skip * x).astype(y.dtype)
  gpu.commit()
  plgpu.copy_smem_to_gmem(row, y.at[*place])


def _sum(fused, row, dC, place, me, block, *, products):
  """Sums over channels of fused states and the cotangents in the row."""
  image, done, *_ = place
  values = [x * row[j].astype(jnp.float32) for j, x in enumerate(fused)]
  gpu.store_sums(values, products.at[me], dC.at[block, image, done, me])


def _column(states, cut, me, j):
  """Column j of a row of states [W, D]; beyond the image, the border.

  That is chosen after loading: see `Share.read`.
  """
  beyond = cut.is_beyond(me, j)
  border = 0 if j < 0 else cut.columns - 1
  if beyond is True:
    return cut.read(states, me, border)
  value = cut.read(states, me, j)
  if beyond is False:
    return value
  return jnp.where(beyond, cut.read(states, me, border), value)


def _add(column, in_row, taps, sums, size):
  """Adds what a row of states gives to rows of pixels.

  Args:
    column: see `_column`.
    in_row: [(column offset, (which of `sums`, place among the weights))].
    taps: see `Weights`.
    sums: for each row of pixels and each of its columns a vector, or None where
      there is none yet. Changed.
    size: columns of a row.
  """
  weights = {place: taps[place] for _, (_, place) in in_row}
  for j, readers in columns_read(in_row, size):
    value = column(j)
    for i, (target, place) in readers:
      total = sums[target]
      total[i] = gpu.add(total[i], weights[place] * value)
