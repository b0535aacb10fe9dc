"""The structure-aware SSM as TPU kernels: one pass forward, one backward.

Forward, row r of an image is scanned while row r - 5 is fused and read out.
Backward, rows come from the last to the first: row r is scanned anew, from the
state that the forward pass left of the row above, while the cotangents of row
r + 5 are computed. See `tpu_rows` for how arrays lie.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from spatial_mamba_kernels import tpu_rows as rows
from spatial_mamba_kernels.selective_scan.xla import softplus
from spatial_mamba_kernels.state_fusion import xla as fusion
from spatial_mamba_kernels.typing import Array

TAPS = fusion.stencil_taps(fusion.DILATIONS)
ROW_TAPS = rows.by_row(list(TAPS))
REACH = max(fusion.DILATIONS)
WINDOW = 2 * REACH + 1


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes that decide the speed, not the result.

  Attributes:
    fuse_tile: columns fused together. More of them share loads of the same
      states, until 64 registers no longer hold their sums.
    scan_tile: columns scanned in one piece of code, divided by the states. The
      exponentials of all of them are computed while the recurrence waits.
    vmem_bytes: what a kernel may use of the 16 MiB that a v5e gives it.
  """

  fuse_tile: int = 14
  scan_tile: int = 28
  vmem_bytes: int = 15 * 2**20


CONFIG = Config()


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the work is cut.

  Attributes:
    group: images computed together, along the sublanes.
    block: channels computed together, along the lanes.
  """

  group: int
  block: int


def plan(arrays: tuple[Array, ...]) -> Plan:
  """The largest cut whose backward pass fits into VMEM.

  Args:
    arrays: what the operator is given.

  Raises:
    NotImplementedError: none does, or a type is not for a TPU.
  """
  u, delta, A, *_ = arrays
  batch, _, width, channels = u.shape
  states = A.shape[1]
  for array in arrays:
    if array.dtype not in (jnp.float32, jnp.bfloat16):
      raise NotImplementedError(
        f"mosaic_tpu computes float32 and bfloat16, not {array.dtype}"
      )
  itemsize = max(u.dtype.itemsize, delta.dtype.itemsize)
  lanes = -(-channels // rows.LANES)
  for group in (8, 4, 2, 1):
    group = min(group, batch)
    for blocks in range(1, lanes + 1):
      block = min(channels, -(-lanes // blocks) * rows.LANES)
      size = _backward_bytes(group, block, width, states, itemsize)
      if size <= CONFIG.vmem_bytes:
        return Plan(group, block)
  raise NotImplementedError(
    f"mosaic_tpu keeps {2 * WINDOW} rows of states on the chip, which do not"
    f" fit for rows of {width} tokens and {states} states"
  )


def _backward_bytes(group, block, width, states, itemsize):
  lanes = -(-block // rows.LANES) * rows.LANES
  packed = max(group, 4 // itemsize)
  state_row = width * states * group * lanes * 4
  image_row = width * packed * lanes * itemsize
  lane_rows = states * group * -(-width // rows.LANES) * rows.LANES * 4
  scratch = (2 * WINDOW + 2 + len(_DISTANCES)) * state_row
  scratch += 3 * (REACH + 1) * image_row
  # Two of each row that comes or goes: three images and two cotangents.
  return scratch + 2 * (5 * image_row + 5 * lane_rows + state_row // width)


_DISTANCES = sorted(offset for offset in ROW_TAPS if offset > 0)
_NOTHING = WINDOW  # A row of zeros in the ring of cotangents.
_BORDER = WINDOW + 1  # Sums of rows, for the first and last row of an image.


def run_forward(arrays: tuple[Array, ...], *, save: bool) -> tuple[Array, ...]:
  """The operator on one device.

  Args:
    arrays: u, delta, A, B, C, D, kernels, alpha, delta_bias, as the operator
      takes them.
    save: whether the backward pass will follow.

  Returns:
    y, and what `run_backward` needs of the forward pass if `save`.

  Raises:
    NotImplementedError: see `plan`.
  """
  cut = plan(arrays)
  y, *saved = forward(*_lay_out(arrays, cut), save=save, block=cut.block)
  return rows.images_of(y, len(arrays[0])), *saved


def run_backward(
  arrays: tuple[Array, ...], saved: Array, g: Array
) -> tuple[Array, ...]:
  """The cotangents of `arrays`; those of parameters as sums over some images.

  Returns:
    du, ddelta [B, H, W, D]; dB, dC [K, B, H, W, N], to be summed over K; and
    [G, T + N + 2, D], to be summed over G: of the merged weights, A, D and
    delta_bias.
  """
  cut = plan(arrays)
  du, ddelta, dB, dC, parameters = backward(
    *_lay_out(arrays, cut),
    saved,
    rows.rows_of(g, cut.group),
    block=cut.block,
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


def merged_weights(kernels: Array, alpha: Array) -> Array:
  """The stencil's weights as the kernels take them, [T, D]."""
  kernels, alpha = kernels.astype(jnp.float32), alpha.astype(jnp.float32)
  return fusion.merge_weights(alpha[:, None, None, None] * kernels, TAPS)


def _lay_out(arrays, cut):
  u, delta, A, B, C, D, kernels, alpha, bias = arrays
  return (
    rows.rows_of(u, cut.group),
    rows.rows_of(delta, cut.group),
    A.astype(jnp.float32).T,
    rows.lane_rows_of(B, cut.group),
    rows.lane_rows_of(C, cut.group),
    D.astype(jnp.float32)[None],
    merged_weights(kernels, alpha),
    bias.astype(jnp.float32)[None],
  )


def forward(u, delta, A, B, C, D, weights, bias, *, save, block):
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

  image = partial(_block, (width, None, group, block))
  tokens = partial(_block, (states, None, group, B.shape[-1]), is_image=False)
  state = partial(_block, (states, None, group, block))
  out_specs = [image(lagging)]
  out_shape = [jax.ShapeDtypeStruct(u.shape, u.dtype)]
  if save:
    out_specs.append(state(now))
    shape = (height, states, groups, group, channels)
    out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
  return pl.pallas_call(
    partial(_forward_kernel, height=height),
    grid=(groups, -(-channels // block), height + REACH),
    in_specs=[
      image(now),
      image(now),
      tokens(now),
      tokens(lagging),
      *(_parameter(x, block) for x in (A, D, weights, bias)),
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[
      pltpu.VMEM((WINDOW, width, states, group, block), jnp.float32),
      pltpu.VMEM((REACH + 1, width, group, block), u.dtype),
      pltpu.VMEM((states, group, block), jnp.float32),
    ],
    compiler_params=_COMPILER_PARAMS,
    name="structure_aware_ssm_forward",
  )(u, delta, B, C, A, D, weights, bias)


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
    _scan_row(u, delta, A, B, bias, carry, ring.at[r % WINDOW])
    for out in saved:
      out[...] = carry[...]

  @pl.when(r >= REACH)
  def _():
    row = r - REACH
    x = skip.at[row % (REACH + 1)]
    slots = _slots(row, height)

    def fuse(lanes):
      def tile(first, size, _):
        def observe(n, total):
          c = rows.columns_from(C[n].astype(jnp.float32), first)
          fused = _fuse_tile(ring, slots, n, lanes, weights, first, size)
          return [
            t + c[:, j : j + 1] * f
            for j, (t, f) in enumerate(zip(total, fused, strict=True))
          ]

        total = [
          D[:, lanes] * x[first + j, :, lanes].astype(jnp.float32)
          for j in range(size)
        ]
        total = rows.for_states(states, observe, total)
        for j in range(size):
          y[first + j, :, lanes] = total[j].astype(y.dtype)

      rows.for_tiles(width, CONFIG.fuse_tile, tile, None)

    rows.for_lanes(channels, fuse)


def _fuse_tile(ring, slots, n, lanes, weights, first, size):
  """A tile of fused states."""
  fused = [None] * size
  for offset, taps in ROW_TAPS.items():
    weight = _weights_of(taps, weights, lanes)
    h = ring.at[slots[offset]]
    for value, hits in _neighbours(h, n, lanes, taps, first, size):
      for j, place in hits:
        fused[j] = rows.add(fused[j], weight[place] * value)
  return fused


def backward(u, delta, A, B, C, D, weights, bias, saved, g, *, block):
  """Cotangents of all that `forward` was given.

  Those of the parameters are sums over a group of images, those of B and C over
  a block of channels.

  Returns:
    du, ddelta [H, W, G, b, D]; dB, dC [K, H, N, G, b, Wp], K blocks; and
    [G, T + N + 2, D]: those of the weights, of A, D and the bias.
  """
  height, width, groups, group, channels = u.shape
  states = A.shape[0]
  blocks = -(-channels // block)

  def scanned(step):
    return jnp.maximum(height - 1 - step, 0)

  def above(step):
    return jnp.maximum(height - 2 - step, 0)

  def finished(step):
    return _clip(height - 1 - step + REACH, height)

  image = partial(_block, (width, None, group, block))
  tokens = partial(_block, (states, None, group, B.shape[-1]), is_image=False)
  state = partial(_block, (states, None, group, block))
  sums = len(TAPS) + states + 2
  row = (width, states, group, block)
  lane_rows = pl.BlockSpec(
    (None, None, states, None, group, B.shape[-1]),
    lambda i, c, step: (c, finished(step), 0, i, 0, 0),
  )
  lane_rows_shape = jax.ShapeDtypeStruct((blocks, *B.shape), jnp.float32)
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
      state(above),
      *(_parameter(x, block) for x in (A, D, weights, bias)),
    ],
    out_specs=[
      image(finished),
      image(finished),
      lane_rows,
      lane_rows,
      pl.BlockSpec((None, sums, block), lambda i, c, step: (i, 0, c)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(u.shape, u.dtype),
      jax.ShapeDtypeStruct(u.shape, delta.dtype),
      lane_rows_shape,
      lane_rows_shape,
      jax.ShapeDtypeStruct((groups, sums, channels), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((WINDOW, *row), jnp.float32),
      pltpu.VMEM((WINDOW + 1 + len(_DISTANCES), *row), jnp.float32),
      *(
        pltpu.VMEM((REACH + 1, width, group, block), x.dtype)
        for x in (u, delta, g)
      ),
      pltpu.VMEM(row, jnp.float32),
      pltpu.VMEM((states, group, block), jnp.float32),
      pltpu.VMEM((states, group, block), jnp.float32),
      pltpu.VMEM((sums, group, block), jnp.float32),
    ],
    compiler_params=_COMPILER_PARAMS,
    name="structure_aware_ssm_backward",
  )(u, delta, g, B, B, C, saved, A, D, weights, bias)


# Rows follow one another; groups of images and blocks of channels need not.
_COMPILER_PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel", "arbitrary")
)


def _block(shape, row_of, *, is_image=True):
  """One row of one group of images, of one block of channels if it has them."""
  return pl.BlockSpec(
    (None, *shape),
    lambda i, c, step: (row_of(step), 0, i, 0, c if is_image else 0),
  )


def _parameter(x, block):
  return pl.BlockSpec((x.shape[0], block), lambda i, c, step: (0, c))


def _backward_kernel(
  u, delta, g, B, B_finished, C, above, A, D, weights, bias,
  du, ddelta, dB, dC, dparams,
  ring, dfused, us, deltas, gs, dh, carry, adjoint, sums,
  *, height, channels,
):  # fmt: skip
  s = pl.program_id(2)
  r = height - 1 - s
  row = r + REACH
  block = u.shape[-1]
  # The last block of channels may reach beyond the last channel.
  inside = channels - pl.program_id(1) * block if channels % block else None

  @pl.when(s == 0)
  def _():
    adjoint[...] = jnp.zeros_like(adjoint)
    sums[...] = jnp.zeros_like(sums)
    dfused[_NOTHING] = jnp.zeros(dh.shape, dh.dtype)

  @pl.when(r >= 0)
  def _():
    carry[...] = jnp.where(r > 0, above[...], 0)
    _scan_row(u, delta, A, B, bias, carry, ring.at[r % WINDOW])
    for copy, x in ((us, u), (deltas, delta), (gs, g)):
      copy[r % (REACH + 1)] = x[...]
    _observe_backward(g, C, dfused.at[r % WINDOW])

  @pl.when(row < height)
  def _():
    place = row % (REACH + 1)
    dB[...] = jnp.zeros_like(dB)
    dC[...] = jnp.zeros_like(dC)
    _add_border_rows(dfused, row, height)

    slots = _slots(row, height)
    sources = {offset: _source_row(row, offset, height) for offset in ROW_TAPS}
    before = ring.at[(row - 1) % WINDOW]

    def finish(lanes):
      _fuse_weights_backward(
        ring, slots, dfused, gs.at[place], weights, dC, sums, lanes, inside
      )
      _fuse_states_backward(dfused, sources, weights, dh, lanes)
      _scan_backward(
        us.at[place], deltas.at[place], gs.at[place], A, B_finished, D, bias,
        ring.at[slots[0]], before, dh, adjoint, du, ddelta, dB, sums, row,
        lanes, inside,
      )  # fmt: skip

    rows.for_lanes(block, finish)

  @pl.when(s == height + REACH - 1)
  def _():
    dparams[...] = jnp.sum(sums[...], axis=1)


def _clip(row, height):
  return jnp.clip(row, 0, height - 1)


def _slots(row, height):
  """{row offset: where in the ring that neighbour of a row lies}."""
  return {offset: _clip(row + offset, height) % WINDOW for offset in ROW_TAPS}


def _neighbours(h, n, lanes, taps, first, size):
  """For each column that a tile's stencil reads in a row: value, and by whom.

  Yields (states [b, lanes], [(place in the tile, place among the weights)]).
  """
  for column, hits in _hits(taps, size):
    yield h[_clip(first + column, h.shape[0]), n, :, lanes], hits


def _weights_of(taps, weights, lanes):
  """{place: weight} of a row's taps, loaded once."""
  return {place: weights[pl.ds(place, 1), lanes] for _, place in taps}


def _hits(taps, size):
  reach = max(abs(column) for column, _ in taps)
  for column in range(-reach, size + reach):
    hits = [
      (column - offset, place)
      for offset, place in taps
      if 0 <= column - offset < size
    ]
    if hits:
      yield column, hits


def _scan_row(u, delta, A, B, bias, carry, out):
  """Scans a row on from `carry`, which it replaces."""
  width, _, channels = u.shape
  states = A.shape[0]

  def scan(lanes):
    def tile(first, size, h):
      b = _columns(B, first)
      for j in range(size):
        x = u[first + j, :, lanes].astype(jnp.float32)
        dt = _time_step(delta, bias, first + j, lanes)
        h = tuple(
          jnp.exp(dt * A[pl.ds(n, 1), lanes]) * h[n]
          + (dt * x) * b[n][:, j : j + 1]
          for n in range(states)
        )
        for n in range(states):
          out[first + j, n, :, lanes] = h[n]
      return h

    h = tuple(carry[n, :, lanes] for n in range(states))
    h = rows.for_tiles(width, _scan_tile(states), tile, h)
    for n in range(states):
      carry[n, :, lanes] = h[n]

  rows.for_lanes(channels, scan)


def _scan_tile(states):
  return max(CONFIG.scan_tile // states, 1)


def _columns(per_token, first):
  """The numbers of a tile's tokens, for each state, its first column first."""
  return [
    rows.columns_from(per_token[n].astype(jnp.float32), first)
    for n in range(per_token.shape[0])
  ]


def _time_step(delta, bias, column, lanes):
  return softplus(delta[column, :, lanes].astype(jnp.float32) + bias[:, lanes])


def _observe_backward(g, C, dfused):
  """What the fused states of a row contribute: C times the cotangent of y."""
  width, _, channels = g.shape

  def observe(lanes):
    def tile(first, size, _):
      c = _columns(C, first)
      for j in range(size):
        dy = g[first + j, :, lanes].astype(jnp.float32)
        for n in range(len(c)):
          dfused[first + j, n, :, lanes] = c[n][:, j : j + 1] * dy

    rows.for_tiles(width, _scan_tile(C.shape[0]), tile, None)

  rows.for_lanes(channels, observe)


def _fuse_weights_backward(
  ring, slots, dfused, g, weights, dC, sums, lanes, inside
):
  """Cotangents of C and of the stencil's weights, from one row of pixels."""
  states, width = ring.shape[2], ring.shape[1]
  dfused = dfused.at[slots[0]]

  def tile(first, size, _):
    def of_state(n, _):
      cotangent = [dfused[first + j, n, :, lanes] for j in range(size)]
      fused = [None] * size
      for offset, taps in ROW_TAPS.items():
        weight, dweights = _weights_of(taps, weights, lanes), {}
        h = ring.at[slots[offset]]
        for value, hits in _neighbours(h, n, lanes, taps, first, size):
          for j, place in hits:
            fused[j] = rows.add(fused[j], weight[place] * value)
            dweights[place] = rows.add(
              dweights.get(place), cotangent[j] * value
            )
        for place, total in dweights.items():
          sums[place, :, lanes] += total
      products = [
        g[first + j, :, lanes].astype(jnp.float32) * fused[j]
        for j in range(size)
      ]
      dC[n] += _lane_sums(products, first, dC.shape[1:], lanes, inside)

    rows.for_states(states, of_state, None)

  rows.for_tiles(width, CONFIG.fuse_tile, tile, None)


def _lane_sums(products, first, shape, lanes, inside):
  """The sums over channels, each in the lane of its token."""
  token = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  total = None
  for j, product in enumerate(products):
    if inside is not None:
      channel = jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
      product = jnp.where(lanes.start + channel < inside, product, 0)
    value = jnp.sum(product, axis=1, keepdims=True)
    total = rows.add(total, jnp.where(token == first + j, value, 0))
  return total


def _add_border_rows(dfused, row, height):
  """Rows that replication folds onto the first or the last row of an image."""
  for place, distance in enumerate(_DISTANCES):

    def add(first, last, place=place):
      dfused[_BORDER + place] = dfused[first % WINDOW]

      @pl.loop(first + 1, last + 1)
      def _(t):
        dfused[_BORDER + place] += dfused[t % WINDOW]

    @pl.when(row == 0)
    def _(add=add, distance=distance):
      add(0, min(distance, height - 1))

    @pl.when((row == height - 1) & (row > 0))
    def _(add=add, distance=distance):
      add(max(height - 1 - distance, 0), height - 1)


def _source_row(row, offset, height):
  """Where in the ring the pixels lie that see `row` at a tap's row offset."""
  if height == 1:
    return 0
  if not offset:
    return row % WINDOW
  border = _BORDER + _DISTANCES.index(abs(offset))
  at_border = row == (0 if offset < 0 else height - 1)
  source = row - offset
  inside = (source >= 0) & (source < height)
  return jnp.where(
    at_border, border, jnp.where(inside, source % WINDOW, _NOTHING)
  )


def _fuse_states_backward(dfused, sources, weights, dh, lanes):
  """The cotangents of a row of states: the transpose of the stencil."""
  width, states, group, _ = dh.shape

  def tile(first, size, _):
    def of_state(n, _):
      total = [None] * size
      for offset, taps in ROW_TAPS.items():
        source = dfused.at[sources[offset]]
        weight = _weights_of(taps, weights, lanes)
        transposed = [(-column, place) for column, place in taps]
        for column, hits in _hits(transposed, size):
          value = source[_clip(first + column, width), n, :, lanes]
          if not 0 <= column < size:
            inside = (first + column >= 0) & (first + column < width)
            value = jnp.where(inside, value, 0)
          for j, place in hits:
            total[j] = rows.add(total[j], weight[place] * value)
      for j in range(size):
        dh[first + j, n, :, lanes] = total[j]

    rows.for_states(states, of_state, None)

  rows.for_tiles(width, CONFIG.fuse_tile, tile, None)

  def fold(n, _):
    """What replication folds onto the first and the last column."""
    for offset, taps in ROW_TAPS.items():
      source = dfused.at[sources[offset]]
      for border, sign in ((0, -1), (width - 1, 1)):
        total = jnp.zeros((group, lanes.size), jnp.float32)
        folded = None
        for distance in range(REACH):
          if distance < width:
            total += source[border - sign * distance, n, :, lanes]
          for column, place in taps:
            if column == sign * (distance + 1):
              product = weights[pl.ds(place, 1), lanes] * total
              folded = rows.add(folded, product)
        if folded is not None:
          dh[border, n, :, lanes] += folded

  rows.for_states(states, fold, None)


def _scan_backward(
  u, delta, g, A, B, D, bias,
  here, before, dh, adjoint, du, ddelta, dB, sums, row, lanes, inside,
):  # fmt: skip
  """From the cotangents of a row's states back to all that made them."""
  width, states, _, _ = dh.shape

  def previous(first, n):
    """The state before a tile: at column 0 the last of the row above."""
    above = jnp.where(row > 0, before[width - 1, n, :, lanes], 0)
    left = here[jnp.maximum(first - 1, 0), n, :, lanes]
    return jnp.where(first > 0, left, above)

  def tile(first, size, flow):
    b = _columns(B, first)
    dA, dD, dbias = [None] * states, None, None
    products = [[] for _ in range(states)]
    for j in reversed(range(size)):
      x = u[first + j, :, lanes].astype(jnp.float32)
      dy = g[first + j, :, lanes].astype(jnp.float32)
      before_softplus = (
        delta[first + j, :, lanes].astype(jnp.float32) + bias[:, lanes]
      )
      dt = softplus(before_softplus)
      ddt, dx = jnp.zeros_like(dt), D[:, lanes] * dy
      into = []
      for n in range(states):
        a = A[pl.ds(n, 1), lanes]
        decay = jnp.exp(dt * a)
        adjoint_n = dh[first + j, n, :, lanes] + flow[n]
        into.append(decay * adjoint_n)
        h = here[first + j - 1, n, :, lanes] if j else previous(first, n)
        ddecay = into[n] * h
        drive = adjoint_n * b[n][:, j : j + 1]
        ddt = ddt + ddecay * a + drive * x
        dx = dx + drive * dt
        dA[n] = rows.add(dA[n], ddecay * dt)
        products[n].insert(0, adjoint_n * (dt * x))
      flow = tuple(into)
      dbefore = ddt * jax.nn.sigmoid(before_softplus)
      du[first + j, :, lanes] = dx.astype(du.dtype)
      ddelta[first + j, :, lanes] = dbefore.astype(ddelta.dtype)
      dD, dbias = rows.add(dD, dy * x), rows.add(dbias, dbefore)
    for place, total in enumerate((*dA, dD, dbias), len(TAPS)):
      sums[place, :, lanes] += total
    for n in range(states):
      dB[n] += _lane_sums(products[n], first, dB.shape[1:], lanes, inside)
    return flow

  flow = tuple(adjoint[n, :, lanes] for n in range(states))
  flow = rows.for_tiles(width, _scan_tile(states), tile, flow, reverse=True)
  for n in range(states):
    adjoint[n, :, lanes] = flow[n]
