"""The structure-aware SSM forward, as one GPU kernel from scan to observation.

The forward pass computes y. The backward pass uses the same kernel for the
cotangents of C alone, for which it recomputes the fused states.

The kernel goes down an image. The warpgroups of a program scan row r together
(see `gpu_share`) and write its states to a ring in shared memory. A row of
pixels reads states up to 5 rows above and below it: those above it once it has
been scanned, from the ring; those below it when they are scanned, into sums
that stay in registers. A ring of all eleven rows would not fit at 56 x 56.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from spatial_mamba_kernels.gpu import threads as gpu
from spatial_mamba_kernels.gpu.threads import plgpu
from spatial_mamba_kernels.structure_aware_ssm import gpu_share
from spatial_mamba_kernels.structure_aware_ssm.gpu_fused_row import (
  FINISHING,
  GOING_ON,
  RING,
  Inputs,
  Observation,
  Outputs,
  Scratch,
  Walk,
  observe,
  sum_products,
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
from spatial_mamba_kernels.typing import Array


def share(
  shape: tuple[int, ...], image: Any, delta: Any, *, products: int = 0
) -> Share:
  """Returns how the kernel shares columns.

  Args:
    shape: of the images, [B, H, W, D].
    image: type of the images.
    delta: type of the time steps.
    products: columns of a warpgroup whose products are summed over channels at
      once.

  Raises:
    NotImplementedError: see `gpu_share.share`.
  """
  loaded = [jnp.dtype(x).itemsize for x in (image, delta, image)]

  def bytes_of(width, warpgroups):
    rows = [width * gpu.CHANNELS * size for size in (RING * 4, *loaded)]
    vectors = [warpgroups * VECTOR_BYTES * count for count in (2, products)]
    return rows + vectors

  return gpu_share.share(shape, bytes_of)


def forward(scanned: Scanned, C: Array, D: Array, *, save: bool) -> list[Array]:
  """Returns y and, if `save`, the state after each row, [H, 1, B, D].

  Args:
    scanned: the other arguments.
    C: [B, H, W].
    D: [D].
    save: see above.
  """
  u = scanned.u
  batch, height, _, channels = u.shape
  cut = share(u.shape, u.dtype, scanned.delta.dtype)
  padded = gpu.blocks(channels) * gpu.CHANNELS
  shape = (height, 1, batch, padded)
  results = _run(
    observe,
    scanned,
    u,
    Observation(C.astype(jnp.float32), gpu.parameters(D[None])),
    Outputs(
      cut.result(gpu.pad_channels(u), u.dtype),
      jax.ShapeDtypeStruct(shape, jnp.float32) if save else None,
    ),
    cut,
    name="structure_aware_ssm_forward",
  )
  return [x[..., :channels] for x in results if x is not None]


def observation_backward(scanned: Scanned, dy: Array) -> Array:
  """Returns the cotangents of C, [K, B, H, W], to be summed over K.

  Args:
    scanned: as for `forward`.
    dy: [B, H, W, D], the cotangents of y.
  """
  u = scanned.u
  batch, height, _, channels = u.shape
  cut = share(u.shape, u.dtype, scanned.delta.dtype, products=SUMMED)
  shape = (gpu.blocks(channels), batch, height, cut.warpgroups, cut.sums)
  dC, _ = _run(
    sum_products,
    scanned,
    dy,
    None,
    Outputs(jax.ShapeDtypeStruct(shape, jnp.float32)),
    cut,
    name="structure_aware_ssm_observation_backward",
    products=plgpu.SMEM((cut.warpgroups, SUMMED, gpu.CHANNELS), jnp.float32),
  )
  return cut.of_columns(dC)


def _run(
  finish: Callable[..., None],
  scanned: Scanned,
  image: Array,
  observation: Observation | None,
  results: Outputs,
  cut: Share,
  *,
  name: str,
  products: Any = None,
) -> Outputs:
  """Runs the kernel.

  Args:
    finish: what it does with a row of fused states: `observe` or
      `sum_products`.
    scanned: as for `forward`.
    image: [B, H, W, D]; see `Inputs`.
    observation: what `observe` needs.
    results: their types.
    cut: see `Share`.
    name: of the kernel.
    products: scratch that `sum_products` needs.
  """
  rows = (cut.warpgroups, cut.columns, gpu.CHANNELS)
  scratch = Scratch(
    loaded=plgpu.Barrier(num_arrivals=2, num_barriers=cut.warpgroups),
    delta_row_ref=plgpu.SMEM(rows, scanned.delta.dtype),
    image_loaded=plgpu.Barrier(num_barriers=cut.warpgroups),
    image_row_ref=plgpu.SMEM(rows, image.dtype),
    kept_ref=Weights.scratch(cut.kept),
    chained_ref=plgpu.SMEM((2 * cut.warpgroups, gpu.CHANNELS), jnp.float32),
    products_ref=products,
    ring_ref=plgpu.SMEM((RING, cut.width, gpu.CHANNELS), jnp.float32),
    scanned=plgpu.Barrier(num_arrivals=cut.warpgroups),
    u_row_ref=plgpu.SMEM(rows, scanned.u.dtype),
    written=plgpu.Barrier(num_arrivals=cut.warpgroups),
  )
  (outputs,) = gpu.kernel(
    partial(_kernel, finish=finish, cut=cut),
    name=name,
    out_type=(results,),
    scratch_types=(scratch,),
    grid=(len(image), gpu.blocks(image.shape[-1])),
    grid_names=("image", "block"),
    num_threads=cut.warpgroups,
    thread_name="warpgroup",
  )(Inputs(*scanned.operands(), gpu.pad_channels(image)), observation)
  return outputs


def _kernel(
  inputs: Inputs, observation: Any, outputs: Outputs, scratch: Scratch, *,
  finish, cut,
):  # fmt: skip
  walk = Walk(Program.this(cut), inputs, observation, outputs, scratch)
  height = inputs.u_ref.shape[1]

  def step(row, carry):
    state, *sums = carry

    # Scan a row, unless only rows of pixels are left.
    state = lax.cond(
      row < height, partial(walk.scan_row, row), lambda x: x, state
    )

    # Load what is combined with the row of fused states that this finishes.
    done = row - REACH

    @pl.when(done >= 0)
    def _():
      walk.fetch_image(done)

    # Add the last states that this row reads, and write its result.
    sums = [[None] * cut.columns, *map(list, sums)]
    walk.add(FINISHING, row, sums)
    finished = sums.pop()

    @pl.when(done >= 0)
    def _():
      plgpu.barrier_wait(scratch.image_loaded.at[walk.program.warpgroup])
      finish(walk, done, finished)

    # Add states to the rows that read more of them.
    walk.add(GOING_ON, row, sums)
    return state, *sums

  walk.fetch(0)
  pl.when(walk.program.warpgroup == 0)(walk.weights.load)
  cut.meet(scratch.written)
  zeros = [[gpu.zeros() for _ in range(cut.columns)] for _ in range(REACH)]
  lax.fori_loop(0, height + REACH, step, (gpu.zeros(), *zeros))
  plgpu.wait_smem_to_gmem(0)
