"""State fusion as a GPU kernel; `gpu.strips` says how it goes over an image."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import strips
from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.plan import cut_to_fuse
from spatial_mamba_kernels.gpu.strips import Program, Stream
from spatial_mamba_kernels.taps import (
  Slots,
  Stencil,
  columns_read,
)
from spatial_mamba_kernels.typing import Array


def fuse(h, weights, *, stencil, dtype, observe=None):
  """Returns the fused states, or what is observed of them, [B, H, W, D].

  Args:
    h: [B, H, W, D], the states.
    weights: [T, D].
    stencil: its taps.
    dtype: of the result.
    observe: (C [B, H, W], D [D], u [B, H, W, D]), for C * fused + D * u; or
      None.
  """
  channels = h.shape[-1]
  cut = cut_to_fuse(
    h.shape, stencil, h.dtype, observe[2].dtype if observe else h.dtype
  )
  h = gpu.pad_channels(h)
  operands = [h, gpu.parameters(weights)]
  scratch = {
    **gpu.outlet("tile", (cut.strip, gpu.CHANNELS), dtype),
    **Stream.scratch("ring", cut.read, h.dtype, stencil.reach),
  }
  if observe:
    C, D, u = observe
    operands += [C.astype(jnp.float32), gpu.parameters(D[None])]
    operands.append(gpu.pad_channels(u))
    scratch |= Stream.scratch("image", cut.strip, u.dtype, 0)
  y = strips.kernel(
    partial(_fuse_kernel, stencil=stencil),
    h,
    cut,
    out_type=cut.result(h, dtype),
    scratch_types=scratch,
    name="state_fusion_forward",
  )(*operands)
  return y[..., :channels]


def _fuse_kernel(
  h_ref, weights_ref, *refs, stencil, ring, tile=None, ring_barriers=None,
  **scratch,
):  # fmt: skip
  *observed, y_ref, program = refs
  rows = program.first_row, program.end_row
  streams = [
    Stream(program.rows_of(h_ref), ring, ring_barriers, rows, stencil.reach)
  ]
  weights, columns = load_weights(weights_ref, program), program.places()

  def observe(row, fused):
    return fused

  if observed:
    C_ref, D_ref, u_ref = observed
    streams.append(image_stream(u_ref, program, scratch))
    observe = partial(_observe, C_ref, D_ref, program, scratch["image"])

  def fuse_row(row, _):
    slots = stencil.slots(row, program.cut.height, strips.len_of(ring))
    window = Window(stencil, ring, slots, columns, program.cut.strip)
    fused = observe(row, _fuse_columns(window, weights))
    strips.store(fused, tile, program.own_rows_of(y_ref).at[row])

  strips.for_rows(rows, streams, fuse_row, None)
  gpu.finish()


class Window(NamedTuple):
  """What a strip reads for one row.

  Attributes:
    stencil: its taps.
    ring_ref: [R, W, 128], rows of states.
    slots: where the row at each offset is in the ring.
    columns: where each column is in a row; see `Program.places`.
    size: columns of the strip.
  """

  stencil: Stencil
  ring_ref: Any
  slots: Slots
  columns: dict[int, Any]
  size: int

  def values(self) -> Iterator[tuple[Array, Any]]:
    """Yields all states that are read, and by which taps.

    Yields:
      (a vector of channels, [(column of the strip, index of the tap)]).
    """
    for offset, taps in self.stencil.by_row.items():
      row_ref = self.ring_ref.at[self.slots[offset]]
      own_ref = row_ref.at[pl.ds(self.columns[0], self.size)]
      for j, readers in columns_read(taps, self.size):
        inside = 0 <= j < self.size
        value = own_ref[j] if inside else row_ref[self.columns[j]]
        yield value.astype(jnp.float32), readers


def image_stream(image_ref: Any, program: Program, scratch: Any) -> Stream:
  """Returns a stream of a second image's rows, one at a time."""
  return Stream(
    program.own_rows_of(image_ref),
    scratch["image"],
    scratch.get("image_barriers"),
    (program.first_row, program.end_row),
    0,
  )


def load_weights(weights_ref: Any, program: Program) -> list[Array]:
  """Returns a vector of channels for each tap."""
  return [weights_ref[t, program.channels] for t in range(weights_ref.shape[0])]


def _observe(C_ref, D_ref, program, u_rows_ref, row, fused):
  """Returns C * fused + D * u for a row, by column."""
  skip = D_ref[0, program.channels]
  x_ref = u_rows_ref.at[row % strips.len_of(u_rows_ref)]
  c_ref = C_ref.at[program.image, row, pl.ds(program.column, len(fused))]
  return [
    c_ref[j] * value + skip * x_ref[j].astype(jnp.float32)
    for j, value in enumerate(fused)
  ]


def _fuse_columns(window, weights):
  """Returns a row of fused states, by column."""
  fused: list[Any] = [None] * window.size
  for value, readers in window.values():
    for j, tap in readers:
      fused[j] = gpu.add(fused[j], weights[tap] * value)
  return fused
