"""The GPU kernels, interpreted on the CPU, against the sequential operators.

The interpreter raises where copies and threads race, and for what is read or
written beyond an array. It takes the threads of a warpgroup for one.
"""

import contextlib
import sys
import types
from dataclasses import astuple
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from spatial_mamba_kernels.depthwise_conv import gpu_strided
from spatial_mamba_kernels.gpu import device as gpu_device
from spatial_mamba_kernels.gpu import plan as gpu_plan
from spatial_mamba_kernels.gpu import strips as gpu_strips
from spatial_mamba_kernels.gpu import threads as gpu_threads
from spatial_mamba_kernels.layer_norm import mosaic_gpu as gpu_norm
from spatial_mamba_kernels.mlp import gpu_gelu, gpu_products, gpu_weights
from spatial_mamba_kernels.mlp import mosaic_gpu as gpu_mlp
from spatial_mamba_kernels.selective_ssm import plans as ssm_plans
from spatial_mamba_kernels.state_fusion import plans as fusion_plans
from spatial_mamba_kernels.structure_aware_ssm import (
  gpu_backward,
  gpu_fused,
  gpu_share,
)
from spatial_mamba_kernels.taps import Stencil

DILATIONS = (1, 3, 5)

needs_interpreter = pytest.mark.skipif(
  not hasattr(plgpu, "force_gpu_interpret_mode"),
  reason="only JAX 0.12 (Python 3.12) interprets GPU kernels: .ci/run does, on"
  " the newest jax",
)


@pytest.fixture
def on_gpu(monkeypatch):
  """(compute capability) -> kernels are for such a GPU."""

  def of_capability(capability):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(gpu_device, "get_default_device", lambda: device)
    jax.clear_caches()

  yield of_capability
  jax.clear_caches()


@pytest.fixture
def interpreted(monkeypatch, on_gpu):
  """(gpu=, columns=, races=, sizes) -> runs kernels so as JAX operations."""

  def of_sizes(gpu="9.0", columns=gpu_plan.MOST_COLUMNS, races=True, **sizes):
    on_gpu(gpu)
    # The interpreter has no barriers, and no threads that they would hold; nor
    # what threads exchange.
    monkeypatch.setattr(gpu_threads, "_barrier", lambda: None)
    for module in (gpu_mlp, gpu_weights):
      monkeypatch.setattr(module, "sum_rows", lambda x, _: jnp.sum(x, axis=0))
    monkeypatch.setattr(gpu_weights, "add_product", add_product)
    sizes = {"programs": 1, "tokens": 4, "stages": 2, **sizes}
    monkeypatch.setattr(gpu_plan, "CONFIG", gpu_plan.Config(**sizes))
    monkeypatch.setattr(gpu_plan, "MOST_COLUMNS", columns)
    # Copies of one TMA thread are in order, which hides races between them.
    parameters = plgpu.InterpretGPUParams(
      detect_races=races, num_tma_threads_per_device=64
    )
    stack.enter_context(plgpu.force_gpu_interpret_mode(parameters))

  with contextlib.ExitStack() as stack:
    yield of_sizes


def add_product(total, a, b):
  """By way of shared memory: the interpreter multiplies nothing else."""

  def multiply(tiles):
    tile = tiles.at[lax.axis_index("warpgroup")]
    tile[...] = a
    plgpu.commit_smem()
    plgpu.wgmma(total, tile, b)

  tiles = plgpu.SMEM((gpu_products.WARPGROUPS, *a.shape), a.dtype)
  pl.run_scoped(multiply, tiles, collective_axes="warpgroup")


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "dtype", "sizes"),
  [
    ((1, 1, 1, 1, 1), jnp.float32, {}),
    # Rows and columns that are both first and last; a block of channels that
    # reaches beyond the array.
    ((2, 2, 2, 136, 1), jnp.bfloat16, {}),
    # So few images that tokens are cut into chunks, and rows into blocks, in
    # which the ring comes round; fewer channels than are copied.
    ((1, 17, 2, 8, 1), jnp.float32, {"programs": 4}),
    ((1, 17, 2, 136, 1), jnp.bfloat16, {"programs": 8, "gpu": "8.0"}),
    # Strips of 8, 8 and 6 columns; two of these are computed, and written,
    # twice.
    (
      (1, 2, 22, 2, 1),
      jnp.float32,
      {"columns": 8, "programs": 4, "races": False},
    ),
  ],
  ids=str,
)
def test_structure_aware_ssm(
  interpreted, ssm_arguments, assert_is_sequential, shape, dtype, sizes
):
  interpreted(**sizes)
  arrays = ssm_arguments(*shape, images=dtype)
  assert_is_sequential("mosaic_gpu", smk.structure_aware_ssm, arrays, dtype)


@needs_interpreter
def test_warpgroups_that_share_a_row(
  interpreted, ssm_arguments, assert_is_sequential, monkeypatch
):
  """Three of them, with rings that come round."""
  interpreted()
  monkeypatch.setattr(gpu_share, "MOST_COLUMNS", 5)
  arrays = ssm_arguments(1, 12, 15, 8, 1)
  u = arrays["u"]
  cut = gpu_share.Share(3, 5, 25)
  assert gpu_fused.share(u.shape, u.dtype, u.dtype) == cut
  assert gpu_backward.share(u.shape, u.dtype, u.dtype) == cut
  assert_is_sequential("mosaic_gpu", smk.structure_aware_ssm, arrays)


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "dtype", "sizes"),
  [
    ((1, 1, 1, 16), jnp.float32, {}),
    # A last tile that is not full, and channels that are padded.
    ((2, 9, 130, 1), jnp.bfloat16, {}),
    # Chunks of 3, 3, 3 and 2 tiles, of two tokens each.
    ((1, 21, 136, 3), jnp.float32, {"programs": 8, "tokens": 6}),
    ((1, 21, 3, 3), jnp.bfloat16, {"programs": 4, "tokens": 6, "gpu": "8.0"}),
  ],
  ids=str,
)
def test_selective_scan(
  interpreted,
  every_operator,
  assert_is_sequential,
  shape,
  dtype,
  sizes,
):
  interpreted(**sizes)
  batch, length, channels, states = shape
  _, (operator, arrays), _ = every_operator(
    batch, 1, length, channels, states, images=dtype
  )
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "dtype", "sizes"),
  [
    ((1, 1, 1, 1), jnp.float32, {}),
    # Chunks of 2, 2 and 1 segments, the last one not full; padded channels.
    ((1, 18, 130, 2), jnp.bfloat16, {"programs": 8}),
    (
      (1, 18, 130, 5),
      jnp.bfloat16,
      {"programs": 8, "values": 47, "gpu": "8.0"},
    ),
    # Segments of four pieces.
    ((2, 5, 3, 16), jnp.float32, {"values": 86}),
    ((1, 5, 3, 1), jnp.float32, {"gpu": "8.0"}),
  ],
  ids=str,
)
def test_selective_ssm(
  interpreted,
  scan_read_out,
  assert_is_sequential,
  monkeypatch,
  shape,
  dtype,
  sizes,
):
  values = sizes.get("values", 200)
  interpreted(**{name: x for name, x in sizes.items() if name != "values"})
  monkeypatch.setattr(ssm_plans, "SEGMENT", 4)
  monkeypatch.setattr(ssm_plans, "_MOST_VALUES", {True: values, False: values})
  operator, arrays = scan_read_out(*shape, images=dtype)
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "dilations", "dtype", "sizes"),
  [
    ((1, 1, 1, 1), DILATIONS, jnp.bfloat16, {}),
    # A ring that comes round, for padded channels.
    ((1, 14, 2, 130), DILATIONS, jnp.float32, {}),
    # A stencil larger than the image.
    ((1, 3, 4, 2), (2, 7), jnp.float32, {}),
    # Blocks of 3, 3 and 1 rows, and strips of 3, 3 and 1 columns; two more are
    # computed, and written, twice.
    (
      (1, 7, 7, 136),
      (1,),
      jnp.bfloat16,
      {"columns": 3, "programs": 18, "races": False},
    ),
    ((1, 3, 6, 3), (1,), jnp.float32, {"columns": 2}),
    # Two strips, each at a border.
    ((1, 2, 12, 3), DILATIONS, jnp.float32, {"columns": 6}),
    ((1, 14, 12, 3), DILATIONS, jnp.float32, {"columns": 6, "gpu": "8.0"}),
  ],
  ids=str,
)
def test_state_fusion(
  interpreted,
  fusion_arguments,
  assert_is_sequential,
  shape,
  dilations,
  dtype,
  sizes,
):
  interpreted(**sizes)
  arrays = fusion_arguments(shape, dilations, dtype)
  operator = partial(smk.state_fusion, dilations=dilations)
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


@needs_interpreter
@pytest.mark.parametrize("form", ["plain", "residual", "silu"])
@pytest.mark.parametrize(
  ("shape", "dtype", "sizes"),
  [
    ((1, 1, 1, 1), jnp.float32, {}),
    # Rings that come round, for padded channels.
    ((2, 9, 3, 130), jnp.bfloat16, {}),
    # Blocks of 3, 3 and 1 rows, and strips of 3, 3 and 1 columns; two more are
    # computed, and written, twice, and counted once.
    ((1, 7, 7, 8), jnp.float32, {"columns": 3, "programs": 9, "races": False}),
    # Two strips, each at a border.
    ((1, 4, 6, 3), jnp.float32, {"columns": 3}),
    (
      (1, 7, 7, 128),
      jnp.bfloat16,
      {"columns": 3, "programs": 9, "gpu": "8.0", "races": False},
    ),
  ],
  ids=str,
)
def test_depthwise_conv(
  interpreted, convolution, assert_is_sequential, shape, dtype, sizes, form
):
  interpreted(**sizes)
  operator, arrays = convolution(shape, dtype, form)
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "dtype", "numbers", "sizes"),
  [
    ((1, 1, 1, 1), jnp.float32, 1, {}),
    ((2, 9, 3, 130), jnp.float32, 18, {}),
    ((1, 6, 5, 24), jnp.bfloat16, 6, {}),
    ((1, 5, 4, 128), jnp.bfloat16, 3, {"gpu": "8.0"}),
    # Blocks of rows, and strips that are computed twice.
    (
      (1, 7, 7, 8),
      jnp.float32,
      6,
      {"columns": 3, "programs": 9, "races": False},
    ),
  ],
  ids=str,
)
def test_projected_depthwise_conv(
  interpreted, convolution, assert_is_sequential, shape, dtype, numbers, sizes
):
  interpreted(**sizes)
  operator, arrays = convolution(shape, dtype, "projected", numbers=numbers)
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


def test_what_projects_apart(on_gpu, convolution):
  """Too many numbers."""

  def kernel(numbers):
    operator, arrays = convolution(
      (1, 2, 2, 128), jnp.float32, "projected", numbers=numbers
    )
    jax.eval_shape(
      lambda arrays: operator(**arrays, implementation="mosaic_gpu"), arrays
    )

  on_gpu("9.0")
  kernel(20)
  with pytest.raises(NotImplementedError, match="20 numbers at most, not 21"):
    kernel(21)


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "dtype", "stride", "gpu"),
  [
    # Warpgroups that have nothing to do.
    ((1, 1, 1, 32), jnp.float32, 2, "9.0"),
    # Fewer images than a warpgroup has at a time, with an even and an odd
    # number of pixels; two blocks of channels.
    ((5, 6, 7, 256), jnp.bfloat16, 2, "9.0"),
    ((1, 7, 2, 64), jnp.float32, 2, "8.0"),
    # A result stands for 9 pixels; and for 16, some of which are in no sum.
    ((2, 5, 8, 96), jnp.float32, 3, "9.0"),
    ((1, 9, 7, 32), jnp.bfloat16, 4, "9.0"),
  ],
  ids=str,
)
def test_relu_depthwise_conv(
  interpreted,
  strided_convolution,
  assert_is_sequential,
  monkeypatch,
  shape,
  dtype,
  stride,
  gpu,
):
  interpreted(gpu)
  # The second case then has strips of two rows and of one.
  monkeypatch.setattr(gpu_strided, "WORKERS", 8)
  operator, arrays = strided_convolution(shape, dtype, stride)
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


@needs_interpreter
@pytest.mark.parametrize(
  ("shape", "hidden", "programs"),
  [
    # A warpgroup without tokens, and one with few.
    ((1, 1, 1, 32), 32, 1),
    # Weights whose stages come round, and a last program that is not full.
    ((2, 7, 19, 64), 320, 1),
    # Half the hidden units at a time.
    ((1, 3, 5, 96), 160, 1),
    # All of the backward pass in one kernel: tiles whose stages come round, in
    # programs that have 5, 5 and 6, and fewer tiles than stages.
    ((3, 13, 25, 64), 256, 3),
    ((2, 1, 1, 64), 256, 1),
    # The weights' cotangents in a kernel, with hidden units shared by two
    # programs, and by three.
    ((2, 7, 19, 64), 512, 1),
    ((3, 9, 25, 128), 384, 6),
  ],
  ids=str,
)
def test_mlp(
  interpreted,
  perceptron,
  assert_is_sequential,
  monkeypatch,
  shape,
  hidden,
  programs,
):
  interpreted(programs=programs)
  monkeypatch.setattr(gpu_weights, "LEAST_TILES", 1)
  operator, arrays = perceptron(shape, hidden, jnp.bfloat16)
  assert_is_sequential("mosaic_gpu", operator, arrays, jnp.bfloat16)


@needs_interpreter
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    # Tokens that are not as many as a warpgroup has at a time; with 4, 16 and
    # 32 threads a token, and with as many numbers a thread as there may be.
    ((2, 3, 5, 32), jnp.float32),
    ((2, 3, 7, 96), jnp.bfloat16),
    ((2, 2, 3, 1024), jnp.bfloat16),
  ],
  ids=str,
)
def test_layer_norm(
  interpreted,
  normalisation,
  assert_is_sequential,
  monkeypatch,
  shape,
  dtype,
  is_gated,
):
  interpreted()
  # Of the last case two programs, of which one has a step more.
  monkeypatch.setattr(gpu_norm, "LOADED", 2**13)
  operator, arrays = normalisation(shape, dtype, is_gated=is_gated)
  assert_is_sequential("mosaic_gpu", operator, arrays, dtype)


class Mapped:
  """An operator on two of everything but its parameters."""

  PARAMETERS = ("A", "delta_bias", "alpha")

  def __init__(self, operator):
    self._operator = operator

  def __call__(self, *, implementation, **arrays):
    axes = {name: None if name in self.PARAMETERS else 0 for name in arrays}

    def one(arrays):
      return self._operator(**arrays, implementation=implementation)

    if implementation != "sequential":
      return jax.vmap(one, (axes,))(arrays)
    return jnp.stack(
      [
        one({k: x if axes[k] is None else x[i] for k, x in arrays.items()})
        for i in range(2)
      ]
    )

  def arguments(self, arrays):
    """Two of what is mapped."""
    return {
      name: x if name in self.PARAMETERS else jnp.stack([x, x[::-1]])
      for name, x in arrays.items()
    }


@pytest.mark.parametrize(
  "implementation",
  [None, pytest.param("mosaic_gpu", marks=needs_interpreter)],
)
@pytest.mark.parametrize("place", [1, 2], ids=["scan", "fusion"])
def test_operators_are_mapped(
  request,
  every_operator,
  assert_is_sequential,
  place,
  implementation,
):
  if implementation:
    request.getfixturevalue("interpreted")()
  operator, arrays = every_operator(2, 1, 3, 5, 1)[place]
  mapped = Mapped(operator)
  assert_is_sequential(implementation, mapped, mapped.arguments(arrays))


class Apart(gpu_share.Share):
  """Warpgroups that do not wait for each other."""

  def meet(self, barrier):
    pass


@needs_interpreter
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_warpgroups_that_do_not_meet_are_a_race(
  interpreted,
  ssm_arguments,
  cotangent,
  value_and_gradients,
  monkeypatch,
  direction,
):
  """Two of them."""
  interpreted()
  monkeypatch.setattr(gpu_share, "MOST_COLUMNS", 5)
  module = gpu_fused if direction == "forward" else gpu_backward
  share = module.share

  def apart(*arguments, **options):
    return Apart(*astuple(share(*arguments, **options)))

  monkeypatch.setattr(module, "share", apart)
  arrays = ssm_arguments(1, 1, 10, 1, 1)
  kernel = partial(smk.structure_aware_ssm, implementation="mosaic_gpu")
  g = cotangent(kernel, arrays)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
    jax.block_until_ready(value_and_gradients(kernel, arrays, g))


@needs_interpreter
@pytest.mark.parametrize(
  ("place", "owner", "name"),
  [
    (0, gpu_threads, "commit"),
    (1, gpu_threads, "commit"),
    (1, plgpu, "wait_smem_to_gmem"),
    (2, gpu_threads, "commit"),
    (2, gpu_strips.Stream, "_wait"),
  ],
  ids=[
    "fused commits",
    "scan commits",
    "scan waits",
    "fusion commits",
    "fusion waits",
  ],
)
def test_what_does_not_wait_is_a_race(
  interpreted, every_operator, monkeypatch, place, owner, name
):
  """That the tests above do fail."""
  interpreted()
  monkeypatch.setattr(owner, name, lambda *_, **__: None)
  operator, arrays = every_operator(1, 13, 1, 1, 1)[place]
  with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
    jax.block_until_ready(operator(**arrays, implementation="mosaic_gpu"))


def wait_for_results(
  copies, wait_read_only=False, wait=plgpu.wait_smem_to_gmem
):
  """Not for what is only being read."""
  if not wait_read_only:
    wait(copies)


@needs_interpreter
@pytest.mark.parametrize(
  ("name", "function"),
  [
    ("commit_smem", lambda: None),
    ("wait_smem_to_gmem", wait_for_results),
  ],
)
def test_an_mlp_that_does_not_wait_is_a_race(
  interpreted,
  perceptron,
  cotangent,
  value_and_gradients,
  monkeypatch,
  name,
  function,
):
  interpreted()
  monkeypatch.setattr(plgpu, name, function)
  operator, arrays = perceptron((1, 1, 1, 32), 128, jnp.bfloat16)
  kernel = partial(operator, implementation="mosaic_gpu")
  g = cotangent(kernel, arrays)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
    jax.block_until_ready(value_and_gradients(kernel, arrays, g))


def test_the_gelu_of_an_mlp_with_its_derivative():
  x = jnp.concatenate([jnp.linspace(-200, 200, 40_001), jnp.array([jnp.inf])])
  value, slope = gpu_gelu.gelu(x)
  exact = partial(jax.nn.gelu, approximate=False)
  np.testing.assert_allclose(value, exact(x), atol=5e-7, rtol=2e-6)
  # Of an infinite x, JAX's derivative is not a number.
  np.testing.assert_allclose(
    slope[:-1], jax.vmap(jax.grad(exact))(x[:-1]), atol=3e-6
  )
  assert slope[-1] == 1
  assert jnp.isnan(jnp.stack(gpu_gelu.gelu(jnp.array(jnp.nan)))).all()


@pytest.mark.parametrize(
  ("capability", "channels", "hidden", "dtype", "why"),
  [
    ("9.0", 32, 64, jnp.float32, "bfloat16 alone, not float32"),
    ("9.0", 33, 64, jnp.bfloat16, "up to 256, not 33"),
    ("9.0", 288, 64, jnp.bfloat16, "up to 256, not 288"),
    ("9.0", 32, 65, jnp.bfloat16, "32 hidden units at a time, not 65"),
    ("10.0", 32, 64, jnp.bfloat16, "Hopper's tensor cores"),
  ],
)
def test_mlps_without_a_kernel(
  perceptron, on_gpu, capability, channels, hidden, dtype, why
):
  on_gpu(capability)
  operator, arrays = perceptron((1, 2, 3, channels), hidden, dtype)
  assert_refused(operator, arrays, why)


def test_an_mlp_for_a_hopper(perceptron, on_gpu):
  on_gpu("9.0")
  operator, arrays = perceptron((1, 2, 3, 256), 1024, jnp.bfloat16)
  assert "mlp_forward" in lowered_for_a_gpu(operator, arrays)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
  ("capability", "channels", "why"),
  [
    ("9.0", 48, "32 channels or a multiple, up to 1024, not 48"),
    ("9.0", 1056, "up to 1024, not 1056"),
  ],
)
def test_normalisations_without_a_kernel(
  normalisation, on_gpu, capability, channels, why, is_gated
):
  on_gpu(capability)
  shape = 1, 2, 3, channels
  assert_refused(*normalisation(shape, jnp.float32, is_gated=is_gated), why)


def test_normalisations_for_a_gpu(normalisation, on_gpu):
  on_gpu("9.0")
  for is_gated in (False, True):
    program = lowered_for_a_gpu(
      *normalisation((1, 2, 3, 64), jnp.bfloat16, is_gated=is_gated)
    )
    assert "layer_norm_forward" in program


def lowered_for_a_gpu(operator, arrays):
  traced = jax.jit(lambda arrays: operator(**arrays)).trace(arrays)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_refused(operator, arrays, why):
  """By name; None leaves it to XLA."""
  with pytest.raises(NotImplementedError, match=why):
    operator(**arrays, implementation="mosaic_gpu")
  assert "mosaic_gpu" not in lowered_for_a_gpu(operator, arrays)


@pytest.mark.parametrize(
  ("place", "states", "why"),
  [
    (0, 2, "one state a channel, not 2"),
    (1, 17, "up to 16 states a channel in registers, not 17"),
  ],
)
def test_too_many_states(every_operator, place, states, why):
  operators = every_operator(1, 2, 3, 4, states)
  assert_refused(*operators[place], why)


def test_what_a_selective_ssm_leaves_to_xla(scan_read_out):
  why = "up to 16 states a channel in registers, not 17"
  assert_refused(*scan_read_out(1, 6, 4, 17), why)


def test_more_images_than_a_gpu_launches():
  shapes = {
    "h": jax.ShapeDtypeStruct((2**16, 1, 1, 1), jnp.float32),
    "kernels": jax.ShapeDtypeStruct((3, 3, 3, 1), jnp.float32),
    "alpha": jax.ShapeDtypeStruct((3,), jnp.float32),
  }

  def fuse(arrays):
    return smk.state_fusion(**arrays, implementation="mosaic_gpu")

  with pytest.raises(NotImplementedError, match="65536 images of 1 channels"):
    jax.eval_shape(fuse, shapes)
  mesh = jax.sharding.AbstractMesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  with jax.sharding.use_abstract_mesh(mesh):
    assert jax.eval_shape(fuse, shapes).shape == (2**16, 1, 1, 1)


def test_channels_that_threads_cannot_copy(convolution, on_gpu, monkeypatch):
  on_gpu("8.0")
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
  assert_refused(*convolution((1, 2, 3, 130), jnp.float32), "130 channels")


def test_strided_convolutions_without_a_kernel(strided_convolution, on_gpu):
  on_gpu("9.0")
  why = "32 channels of a device, or a multiple, not 48"
  assert_refused(*strided_convolution((1, 2, 3, 48), jnp.float32), why)


def test_strided_convolutions_of_channels_that_a_mesh_splits(
  strided_convolution, on_gpu
):
  on_gpu("9.0")
  mesh = jax.sharding.AbstractMesh(
    (2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  operator, arrays = strided_convolution((1, 2, 3, 32), jnp.float32)
  with (
    jax.sharding.use_abstract_mesh(mesh),
    pytest.raises(NotImplementedError, match="or a multiple, not 16"),
  ):
    operator(**arrays, implementation="mosaic_gpu")


@pytest.mark.usefixtures("x64")
def test_double_precision(every_operator):
  for operator, arrays in every_operator(1, 2, 3, 4, 1, images=jnp.float64):
    assert_refused(operator, arrays, "float32 and bfloat16, not float64")


def test_without_absl(every_operator, monkeypatch):
  monkeypatch.setitem(sys.modules, "absl", None)
  for operator, arrays in every_operator(1, 2, 3, 4, 1):
    assert_refused(operator, arrays, "pip install absl-py")


@pytest.mark.parametrize(
  ("capability", "is_kernel"),
  [
    ("7.5", False),
    ("8.0", jax.__version_info__ >= (0, 11, 2)),
    ("9.0", True),
    ("10.3", True),
    ("12.0", True),
    ("gfx942", False),
  ],
)
def test_gpus_without_kernels_are_left_to_xla(
  every_operator, on_gpu, capability, is_kernel
):
  on_gpu(capability)
  for operator, arrays in every_operator(1, 2, 3, 4, 1):
    program = lowered_for_a_gpu(operator, arrays)
    assert ("@mosaic_gpu_v2" in program) == is_kernel


def test_older_gpus_need_a_newer_jax(every_operator, on_gpu, monkeypatch):
  on_gpu("8.0")
  monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
  for operator, arrays in every_operator(1, 2, 3, 4, 1):
    assert_refused(operator, arrays, "needs JAX 0.11.2 or newer")


def test_what_does_not_fit_is_cut(monkeypatch):
  def columns_and_rows(height, width, dtype, programs=1):
    config = gpu_plan.Config(programs=programs)
    monkeypatch.setattr(gpu_plan, "CONFIG", config)
    image = (1, height, width, 128), Stencil(DILATIONS), jnp.float32, dtype
    cuts = gpu_plan.cut_to_fuse(*image), gpu_plan.cut_to_states(*image)
    return [(cut.strip, cut.rows) for cut in cuts]

  assert columns_and_rows(14, 14, jnp.bfloat16) == [(14, 14), (14, 14)]
  assert columns_and_rows(56, 56, jnp.bfloat16) == [(28, 56), (19, 56)]
  assert columns_and_rows(200, 320, jnp.float32) == [(20, 200), (18, 200)]
  # Strips are programs too.
  assert columns_and_rows(28, 28, jnp.float32, 8) == [(28, 6), (14, 7)]


def test_rows_too_wide_for_a_smaller_gpu(fusion_arguments, on_gpu):
  operator = partial(smk.state_fusion, dilations=DILATIONS)
  arrays = fusion_arguments((1, 2, 30, 3), DILATIONS, jnp.float32)
  assert "mosaic_gpu" in lowered_for_a_gpu(operator, arrays)
  on_gpu("12.0")
  assert_refused(operator, arrays, "reads 5 columns")


@pytest.mark.parametrize(
  ("dilation", "width", "why"),
  [(10, 1000, "reads 10 columns"), (16, 7, "reads 16 rows to either side")],
)
def test_a_stencil_that_is_too_wide_is_refused(dilation, width, why):
  h = jnp.empty((1, 2, width, 128), jnp.float32)
  with pytest.raises(NotImplementedError, match=why):
    fusion_plans.gpu_plan((h,), stencil=Stencil((1, dilation)))
