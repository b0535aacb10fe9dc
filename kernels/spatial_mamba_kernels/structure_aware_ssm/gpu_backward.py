"""The structure-aware SSM's walk up an image, as one GPU kernel.

Backward it gives all cotangents but those of C, which `gpu_fused` has. Row r is
scanned once more, from the state that the forward pass saved before it. The
cotangents of what was observed are in a ring in shared memory, of the eleven
rows that flow back to row r; each is read once, for the cotangents of states
and of weights. Then the row is scanned from its end, and what the scan gives
takes the place of what it read. The warpgroups of a program scan a row at once,
each its columns (see `gpu_share`), from zero; what each adds and how much it
lets decay says what the others begin with.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from spatial_mamba_kernels.taps import columns_read, sources

# Row offsets, so that the row that most taps read is the last one: other orders
# take more registers than there are.
FARTHEST_FIRST = sorted(STENCIL.by_row, key=abs, reverse=True)
# Of a warpgroup: what it leaves of a state, what it adds to it, and what to one
# that comes from behind; and what flows back from the row below.
NUMBERS = 4


def share(shape: tuple[int, ...], image: Any, delta: Any) -> Share:
  """For images [B, H, W, D] of this type, with time steps of that one.

  Raises:
    NotImplementedError: see `gpu_share.share`.
  """
  image, delta = (jnp.dtype(x).itemsize for x in (image, delta))

  def bytes_of(width, warpgroups):
    come = STENCIL.window * image, 2 * image, 2 * delta
    rows = [width * gpu.CHANNELS * size for size in come]
    numbers = [warpgroups * VECTOR_BYTES * count for count in (NUMBERS, SUMMED)]
    return rows + numbers

  return gpu_share.share(shape, bytes_of)


def backward(u, delta, A, B, C, D, weights, bias, before, dy):
  """The cotangents of what `gpu_fused.forward` was given, but of C.

  Args:
    u: [B, H, W, D], as for `gpu_fused.forward`, like all up to the bias.
    delta: [B, H, W, D].
    A: [D].
    B: [B, H, W].
    C: [B, H, W].
    D: [D].
    weights: [T, D].
    bias: [D].
    before: [H, 1, B, D], the state that each row left.
    dy: [B, H, W, D], the cotangents of what `gpu_fused.forward` gave.

  Returns:
    du, ddelta [B, H, W, D]; dB [K, B, H, W], to be summed over K; and to be
    summed over G, [G, T, D], of the weights, and [G, 3, D], of A, the bias and
    D.
  """
  batch, height, width, channels = u.shape
  cut = share(u.shape, u.dtype, delta.dtype)
  group, blocks = cut.warpgroups, gpu.blocks(channels)
  image = gpu.pad_channels(u)
  taps, padded = len(weights), blocks * gpu.CHANNELS
  rows = (2, width, gpu.CHANNELS)
  du, ddelta, dB, sums = gpu.kernel(
    partial(_kernel, cut=cut),
    name="structure_aware_ssm_backward",
    out_type=[
      cut.result(image, u.dtype),
      cut.result(image, delta.dtype),
      jax.ShapeDtypeStruct(
        (blocks, batch, height, group, cut.sums), jnp.float32
      ),
      jax.ShapeDtypeStruct((batch, group, taps + 3, padded), jnp.float32),
    ],
    scratch_types={
      "ring": plgpu.SMEM((STENCIL.window, *rows[1:]), dy.dtype),
      "u_rows": plgpu.SMEM(rows, u.dtype),
      "delta_rows": plgpu.SMEM(rows, delta.dtype),
      "numbers": plgpu.SMEM((NUMBERS * group, gpu.CHANNELS), jnp.float32),
      "products": plgpu.SMEM((group, SUMMED, gpu.CHANNELS), jnp.float32),
      **Weights.scratch(cut.kept),
      "come": plgpu.Barrier(num_arrivals=2, num_barriers=group),
      "first_dy_come": plgpu.Barrier(num_arrivals=min(REACH + 1, height)),
      "dy_come": plgpu.Barrier(),
      "scanned": plgpu.Barrier(num_arrivals=group),
      "scanned_back": plgpu.Barrier(num_arrivals=group),
    },
    grid=(batch, blocks),
    grid_names=("image", "block"),
    num_threads=group,
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
    gpu.parameters(before),
    gpu.pad_channels(dy),
  )
  sums = sums.reshape(-1, *sums.shape[2:])[..., :channels]
  return (
    du[..., :channels],
    ddelta[..., :channels],
    cut.of_columns(dB),
    sums[:, :taps],
    sums[:, taps:],
  )


def _kernel(
  u, delta, A, B, C, D, weights, bias, left_by, dy, du, ddelta, dB, sums, *,
  cut, ring, u_rows, delta_rows, numbers, products, come, first_dy_come,
  dy_come, scanned, scanned_back, kept=None,
):  # fmt: skip
  image, me = lax.axis_index("image"), lax.axis_index("warpgroup")
  block = lax.axis_index("block")
  channels = pl.ds(block * gpu.CHANNELS, gpu.CHANNELS)
  height = u.shape[1]
  own, columns = cut.own(me), range(cut.columns)
  taps = Weights(weights, kept, channels)
  a, shift = A[0, channels], bias[0, channels]
  a2 = a * np.float32(np.log2(np.e))
  left, added, added_back, flow = (
    numbers.at[pl.ds(cut.warpgroups * place, cut.warpgroups)]
    for place in range(NUMBERS)
  )

  def places(row):
    return (
      u_rows.at[row % 2, own],
      delta_rows.at[row % 2, own],
    )

  def fetch(row):
    for source, target in zip((u, delta), places(row), strict=True):
      plgpu.copy_gmem_to_smem(
        source.at[image, row, own, channels], target, come.at[me]
      )

  def fetch_dy(row, barrier):
    plgpu.copy_gmem_to_smem(
      dy.at[image, row, :, channels], ring.at[row % STENCIL.window], barrier
    )

  def scan_row(row, u_row, delta_row):
    """The row's time steps, decays and states, of these also the one before."""
    state = left_by[jnp.maximum(row - 1, 0), 0, image, channels]
    state = jnp.where(row > 0, state, 0)
    b = B.at[image, row, own]
    dts, decays, drives = [], [], []
    for j in columns:
      dts.append(gpu.softplus(delta_row[j].astype(jnp.float32) + shift))
      decays.append(jnp.exp(dts[j] * a))
      drives.append(dts[j] * u_row[j].astype(jnp.float32) * b[j])
    product, total = decays[0], drives[0]
    for decay, drive in zip(decays[1:], drives[1:], strict=True):
      product, total = product * decay, total * decay + drive
    left[me], added[me] = product, total
    cut.meet(scanned)
    state, _ = cut.hand_on(state, left, added, me)
    states = [state]
    for decay, drive in zip(decays, drives, strict=True):
      states.append(decay * states[-1] + drive)
    return dts, states

  def step(i, carry):
    row = height - 1 - i
    totals, dweights = carry
    u_row, delta_row = places(row)
    plgpu.barrier_wait(come.at[me])
    dts, states = scan_row(row, u_row, delta_row)

    @pl.when(row > 0)
    def _():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      fetch(row - 1)

    @pl.when((row >= REACH) & (i > 0))
    def _():
      plgpu.barrier_wait(dy_come)

    def cotangents(source):
      return partial(
        _column,
        ring.at[source % STENCIL.window],
        C.at[image, source],
        cut,
        me,
      )

    dh, dweights = _transpose(
      cotangents, row, height, states[1:], taps, dweights, cut, me
    )
    total = gpu.zeros()
    for j in reversed(columns):
      total = jnp.exp2(dts[j] * a2) * (dh[j] + total)
    added_back[me] = total
    # Before another one may be at the next row.
    lefts = [left[other] for other in range(cut.warpgroups)]
    gpu.commit()
    cut.meet(scanned_back)

    @pl.when((me == 0) & (row > REACH))
    def _():
      fetch_dy(row - REACH - 1, dy_come)

    adjoint_after, flow[me] = cut.hand_on(
      flow[me], lefts, added_back, me, reverse=True
    )
    b, cotangent = B.at[image, row, own], ring.at[row % STENCIL.window, own]
    dA, dbias, dD = totals
    summed: list[Any] = [None] * cut.columns
    for j in reversed(columns):
      adjoint = dh[j] + adjoint_after
      adjoint_after = jnp.exp2(dts[j] * a2) * adjoint
      x = u_row[j].astype(jnp.float32)
      g = cotangent[j].astype(jnp.float32)
      ddecay = adjoint_after * states[j]
      drive = adjoint * b[j]
      dbefore = (ddecay * a + drive * x) * gpu.sigmoid(
        delta_row[j].astype(jnp.float32) + shift
      )
      dA, dbias, dD = dA + ddecay * dts[j], dbias + dbefore, dD + g * x
      summed[j] = adjoint * (dts[j] * x)
      u_row[j] = (drive * dts[j] + D[0, channels] * g).astype(du.dtype)
      delta_row[j] = dbefore.astype(ddelta.dtype)
    gpu.store_sums(summed, products.at[me], dB.at[block, image, row, me])
    gpu.commit()
    for source, target in ((u_row, du), (delta_row, ddelta)):
      plgpu.copy_smem_to_gmem(source, target.at[image, row, own, channels])
    return (dA, dbias, dD), dweights

  fetch(height - 1)

  @pl.when(me == 0)
  def _():
    for row in range(max(height - 1 - REACH, 0), height):
      fetch_dy(row, first_dy_come)
    taps.load()

  flow[me] = gpu.zeros()
  cut.meet(scanned)
  plgpu.barrier_wait(first_dy_come)
  zeros = [gpu.zeros() for _ in range(weights.shape[0])]
  carry = (gpu.zeros(), gpu.zeros(), gpu.zeros()), zeros
  totals, dweights = lax.fori_loop(0, height, step, carry)
  for place, total in enumerate((*dweights, *totals)):
    sums[image, me, place, channels] = total
  plgpu.wait_smem_to_gmem(0)


def _column(dy, c, cut, me, j):
  """Column j of a row of cotangents of fused states; zero beyond the image."""
  beyond = cut.is_beyond(me, j)
  if beyond is True:
    return None
  value = cut.read(c, me, j) * cut.read(dy, me, j).astype(jnp.float32)
  return value if beyond is False else jnp.where(beyond, 0, value)


def _transpose(cotangents, row, height, h, taps, dweights, cut, me):
  """What flows back to a row of states, and to the weights.

  Args:
    cotangents: row -> (column -> see `_column`).
    row: of the states.
    height: of the image.
    h: its states.
    taps: see `Weights`.
    dweights: what has flowed back to each of the weights.
    cut: see `Share`.
    me: this warpgroup.

  Returns:
    The cotangents of the states, and `dweights`.
  """
  dh: list[Any] = [gpu.zeros() for _ in h]
  dweights = list(dweights)
  for offset in FARTHEST_FIRST:
    in_row = STENCIL.by_row[offset]
    weights = {place: taps[place] for _, place in in_row}

    def add_row(source, carry, in_row=in_row, weights=weights):
      column, (dh, flows) = cotangents(source), carry
      dh, flows = _add(column, in_row, weights, h, list(dh), dict(flows))
      return _add_borders(column, in_row, weights, h, dh, flows, cut, me)

    first, end = sources(row, offset, height)
    flows = {place: dweights[place] for place in weights}
    dh, flows = lax.fori_loop(first, end, add_row, (dh, flows))
    for place, total in flows.items():
      dweights[place] = total
  return dh, dweights


def _add(column, in_row, weights, h, dh, flows):
  """Adds what flows back from one row of pixels, by the taps of one offset."""
  transposed = [(-offset, place) for offset, place in in_row]
  for source, readers in columns_read(transposed, len(h)):
    value = column(source)
    if value is not None:
      for j, place in readers:
        dh[j] += weights[place] * value
        flows[place] += h[j] * value
  return dh, flows


def _add_borders(column, in_row, weights, h, dh, flows, cut, me):
  """Adds what pixels read beyond the image, to the columns at its borders."""
  for side, border in ((-1, 0), (1, cut.columns - 1)):
    at_border = me == (0 if side < 0 else cut.warpgroups - 1)
    beyond = [tap for tap in in_row if tap[0] * side > 0]

    def fold(_, carry, side=side, border=border, beyond=beyond):
      # Read once more, because there are no registers to keep them.
      pixels = [column(border - side * k) for k in range(min(REACH, cut.width))]
      dh, flows = carry
      flows = dict(flows)
      for offset, place in beyond:
        folded = sum(pixels[1 : abs(offset)], pixels[0])
        dh += weights[place] * folded
        flows[place] += h[border] * folded
      return dh, flows

    carry = dh[border], {place: flows[place] for _, place in beyond}
    times = at_border.astype(jnp.int32)
    dh[border], reads = lax.fori_loop(0, times, fold, carry)
    flows |= reads
  return dh, flows
