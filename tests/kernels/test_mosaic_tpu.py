"""The TPU kernels, interpreted on the CPU, against the sequential operators."""

import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from spatial_mamba_kernels.selective_scan import plans as scan
from spatial_mamba_kernels.selective_ssm import plans as selective_ssm
from spatial_mamba_kernels.state_fusion import plans as fusion
from spatial_mamba_kernels.structure_aware_ssm import plans as ssm
from spatial_mamba_kernels.taps import Stencil
from spatial_mamba_kernels.tpu import plan as tpu_plan

# Tiles and rows small enough to compile in seconds.
SMALL = tpu_plan.Config(tile=4, row=5)


@pytest.fixture
def interpreted(monkeypatch):
  """Runs kernels as JAX operations."""
  jax.clear_caches()
  monkeypatch.setattr(tpu_plan, "CONFIG", SMALL)
  monkeypatch.setattr(
    pl, "pallas_call", partial(pl.pallas_call, interpret=True)
  )
  yield
  jax.clear_caches()


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 1, 1, 1, 1), jnp.float32),
    # Rows and columns that are both first and last.
    ((3, 2, 3, 6, 1), jnp.float32),
    # A group of images and a register filled up.
    ((9, 3, 4, 130, 2), jnp.bfloat16),
    # A ring that comes round.
    ((2, 13, 6, 4, 1), jnp.float32),
    # Tiles of several sizes.
    ((1, 2, 10, 4, 1), jnp.float32),
    pytest.param((1, 1, 5, 3, 16), jnp.float32, marks=pytest.mark.soak),
  ],
  ids=str,
)
def test_structure_aware_ssm(
  interpreted, ssm_arguments, assert_is_sequential, shape, dtype
):
  arrays = ssm_arguments(*shape, images=dtype)
  assert_is_sequential("mosaic_tpu", smk.structure_aware_ssm, arrays, dtype)


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 1, 1, 1), jnp.float32),
    # Rows that are not full, and fill up the last group of images.
    ((9, 7, 130, 2), jnp.bfloat16),
    ((2, 7, 130, 2), jnp.float32),
    # Full ones.
    ((1, 15, 3, 16), jnp.float32),
  ],
  ids=str,
)
def test_selective_scan(
  interpreted, tpu_operators, assert_is_sequential, shape, dtype
):
  batch, length, channels, states = shape
  operators = tpu_operators(batch, 1, length, channels, states, images=dtype)
  operator, arrays = operators["selective_scan"]
  assert_is_sequential("mosaic_tpu", operator, arrays, dtype)


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 1, 1, 5), jnp.float32),
    # The last group of images, register of channels and row are not full.
    ((9, 7, 130, 2), jnp.bfloat16),
    ((3, 13, 5, 1), jnp.float32),
    # Full rows, with more segments than rows.
    ((1, 15, 3, 16), jnp.float32),
  ],
  ids=str,
)
def test_selective_ssm(
  interpreted, tpu_operators, assert_is_sequential, shape, dtype
):
  batch, length, channels, states = shape
  operators = tpu_operators(batch, 1, length, channels, states, images=dtype)
  operator, arrays = operators["selective_ssm"]
  assert_is_sequential("mosaic_tpu", operator, arrays, dtype)


@pytest.mark.parametrize(
  ("shape", "dilations", "dtype"),
  [
    ((1, 1, 1, 1), (1, 3, 5), jnp.float32),
    ((9, 2, 6, 130), (1, 3, 5), jnp.bfloat16),
    ((1, 13, 5, 3), (1, 3, 5), jnp.float32),
    # Other stencils, smaller and larger than the image.
    ((2, 7, 5, 3), (1,), jnp.float32),
    ((1, 3, 4, 2), (2, 7), jnp.float32),
  ],
  ids=str,
)
def test_state_fusion(
  interpreted, fusion_arguments, assert_is_sequential, shape, dilations, dtype
):
  arrays = fusion_arguments(shape, dilations, dtype)
  operator = partial(smk.state_fusion, dilations=dilations)
  assert_is_sequential("mosaic_tpu", operator, arrays, dtype)


def test_blocks_of_channels(
  interpreted,
  tpu_operators,
  assert_is_sequential,
  monkeypatch,
):
  """VMEM for 128 of 192 channels, so that the second block is half full."""
  cut = tpu_plan.Cut(group=2, block=128)
  monkeypatch.setattr(tpu_plan, "cut", lambda *_, **__: cut)
  for operator, arrays in tpu_operators(3, 2, 3, 192, 1).values():
    assert_is_sequential("mosaic_tpu", operator, arrays)


@pytest.mark.soak
@settings(
  max_examples=4,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  st.integers(1, 10),
  st.integers(1, 12),
  st.integers(1, 12),
  st.integers(1, 140),
  st.integers(1, 3),
)
def test_any_shape(
  interpreted,
  ssm_arguments,
  assert_is_sequential,
  batch,
  height,
  width,
  channels,
  states,
):
  arrays = ssm_arguments(batch, height, width, channels, states)
  assert_is_sequential("mosaic_tpu", smk.structure_aware_ssm, arrays)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm", "cpu"])
def test_a_kernel_is_chosen_when_lowering_for_its_platform(
  tpu_operators, value_and_gradients, platform
):
  """On a TPU one each way; on a GPU one for each kind of what is computed."""
  of_gpus = {
    "selective_scan": 2,
    "selective_ssm": 2,
    "state_fusion": 3,
    "structure_aware_ssm": 6,
  }
  for name, (operator, arrays) in tpu_operators(8, 3, 4, 128, 1).items():
    g = jax.eval_shape(lambda a, op=operator: op(**a), arrays)
    traced = value_and_gradients.trace(operator, arrays, g)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    kernels = {"tpu": (2, 0), "cuda": (0, of_gpus[name])}.get(platform, (0, 0))
    calls = program.count("@tpu_custom_call"), program.count("@mosaic_gpu_v2")
    assert calls == kernels


def test_elsewhere_none_is_xla(tpu_operators, assert_is_sequential):
  """Nor is anything lost by saving what the kernels save."""
  for operator, arrays in tpu_operators(2, 3, 4, 5, 2).values():
    assert_is_sequential(None, operator, arrays)


@pytest.mark.soak
def test_second_derivatives(interpreted, tpu_operators):
  """They are XLA's, also those of a named kernel: kernels have none."""
  for operator, arrays in tpu_operators(2, 2, 3, 2, 1).values():

    def curvature(implementation, operator=operator, arrays=arrays):
      def loss(arrays):
        y = operator(**arrays, implementation=implementation)
        return jnp.sum(jnp.sin(y))

      def slope(arrays):
        squares = jax.tree.map(jnp.vdot, *[jax.grad(loss)(arrays)] * 2)
        return sum(jax.tree.leaves(squares))

      return jax.jit(jax.grad(slope))(arrays)

    expected, actual, named = (
      jax.tree.leaves(curvature(x)) for x in ("sequential", None, "mosaic_tpu")
    )
    for a, b in zip(actual, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    # The kernel rounds its sums in another order, and large terms cancel.
    for a, b in zip(named, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("axes", [("data",), ()], ids=["split", "whole"])
def test_within_a_shard_map_none_is_left_to_xla(tpu_operators, axes):
  """One that checks how values vary, which kernels do not say."""
  mesh = jax.sharding.AbstractMesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  images = jax.sharding.PartitionSpec(*axes)
  for operator, arrays in tpu_operators(2, 2, 3, 2, 1).values():
    specs = {
      name: images
      if name in ("u", "delta", "B", "C", "h", "h0")
      else jax.sharding.PartitionSpec()
      for name in arrays
    }
    run = jax.shard_map(
      lambda arrays, operator=operator: operator(**arrays),
      mesh=mesh,
      in_specs=(specs,),
      out_specs=images,
    )
    assert "kernel_by_platform" not in str(jax.make_jaxpr(run)(arrays))


def test_what_does_not_fit_is_cut():
  def plan(batch, height, width, channels, states, dtype=jnp.bfloat16):
    u = jnp.empty((batch, height, width, channels), dtype)
    return ssm.tpu_plan((u, u, jnp.empty((channels, states))))

  assert plan(128, 2, 56, 128, 1) == tpu_plan.Cut(8, 128)
  assert plan(3, 7, 7, 1024, 1) == tpu_plan.Cut(3, 1024)
  assert plan(128, 2, 56, 192, 1) == tpu_plan.Cut(8, 128)
  # 6 images take the place of 8.
  assert plan(6, 2, 56, 192, 1) == tpu_plan.Cut(6, 128)
  assert plan(8, 2, 320, 128, 1).group < 8
  with pytest.raises(NotImplementedError, match="1024 tokens and 16 states"):
    plan(8, 1, 1024, 128, 16)
  with pytest.raises(NotImplementedError, match="float16"):
    plan(1, 2, 2, 4, 1, dtype=jnp.float16)


@pytest.mark.parametrize("plans", [scan, selective_ssm], ids=["scan", "ssm"])
def test_any_length_is_scanned(plans):
  def plan(length, states):
    u = jnp.empty((8, length, 128), jnp.float32)
    return plans.tpu_plan((u, u, jnp.empty((128, states))))

  assert plan(3136, 1) == tpu_plan.Cut(8, 128)
  assert plan(100_003, 16).group == (4 if plans is scan else 8)


def test_rows_divide_a_sequence_or_are_even():
  lengths = 3136, 49, 128, 257
  rows = map(tpu_plan.row_length, lengths)
  assert list(rows) == [112, 49, 128, 128]
  assert list(map(selective_ssm.row_length, lengths)) == [112, 49, 128, 86]


def test_no_more_rows_than_segments():
  for length in range(1, 1000):
    segments = -(-length // selective_ssm.SEGMENT)
    assert selective_ssm.saved_states(length) == segments


def test_a_stencil_that_is_too_wide_is_refused():
  stencil = Stencil((1, 500))
  h = jnp.empty((1, 2, 1000, 128), jnp.float32)
  with pytest.raises(NotImplementedError, match="2006 rows of 1000 pixels"):
    fusion.tpu_plan((h,), stencil=stencil)


@pytest.mark.parametrize(
  ("batch", "axis"), [(8, "data"), (7, "data"), (8, "pipeline")]
)
def test_a_mesh_that_cannot_be_split_is_left_to_xla(ssm_arguments, batch, axis):
  arrays = ssm_arguments(batch, 2, 2, 4, 1)
  mesh = jax.sharding.AbstractMesh(
    (2,), (axis,), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def program(implementation):
    with jax.sharding.use_abstract_mesh(mesh):
      return str(
        jax.make_jaxpr(
          partial(smk.structure_aware_ssm, implementation=implementation)
        )(**arrays)
      )

  if (batch, axis) == (8, "data"):
    assert "kernel_by_platform" in program(None)
    return
  assert "kernel_by_platform" not in program(None)
  with pytest.raises(NotImplementedError, match="a kernel"):
    program("mosaic_tpu")


@pytest.mark.soak
def test_each_device_computes_its_part():
  """2 x 2 devices split images and channels, of which each has half."""
  script = pathlib.Path(__file__).with_name("sharded_kernel.py")
  process = subprocess.run(
    [sys.executable, script],
    capture_output=True,
    text=True,
    timeout=300,
    env={
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
      + " --xla_force_host_platform_device_count=4",
      "PYTHONPATH": os.pathsep.join(sys.path),
    },
  )
  assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
  "name",
  ["structure_aware_ssm", "selective_scan", "selective_ssm", "state_fusion"],
)
def test_no_race_and_nothing_out_of_bounds(
  tpu_operators, value_and_gradients, monkeypatch, capsys, name
):
  """TPU semantics: two cores, buffers, and memory that is not set."""
  jax.clear_caches()
  monkeypatch.setattr(tpu_plan, "CONFIG", SMALL)
  # Two groups of images and two blocks of channels, for two cores.
  cut = tpu_plan.Cut(group=1, block=128)
  monkeypatch.setattr(tpu_plan, "cut", lambda *_, **__: cut)
  operator, arrays = tpu_operators(2, 3, 4, 130, 1)[name]
  kernel = partial(operator, implementation="mosaic_tpu")
  sequential = partial(operator, implementation="sequential")
  g = jnp.ones_like(jax.eval_shape(lambda arrays: kernel(**arrays), arrays))
  expected = value_and_gradients(sequential, arrays, g)
  with pltpu.force_tpu_interpret_mode(
    pltpu.InterpretParams(
      detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan"
    )
  ):
    actual = jax.block_until_ready(value_and_gradients(kernel, arrays, g))
  jax.clear_caches()
  for array, wanted in expected.items():
    np.testing.assert_allclose(
      actual[array], wanted, rtol=1e-4, atol=1e-4, err_msg=array
    )
  assert "RACE" not in capsys.readouterr().out  # JAX prints, and goes on.
