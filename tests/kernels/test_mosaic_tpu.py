"""The TPU kernels, interpreted on the CPU, against the sequential operator."""

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
from spatial_mamba_kernels.structure_aware_ssm import mosaic_tpu

# Sums of some hundred float32 terms; and the rounding of a result to bfloat16.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}


@pytest.fixture
def interpreted(monkeypatch):
  """Runs kernels as JAX operations, their tiles small enough to compile."""
  jax.clear_caches()
  small = mosaic_tpu.Config(fuse_tile=4, scan_tile=3)
  monkeypatch.setattr(mosaic_tpu, "CONFIG", small)
  monkeypatch.setattr(
    pl, "pallas_call", partial(pl.pallas_call, interpret=True)
  )
  yield
  jax.clear_caches()


def arguments(batch, height, width, channels, states, dtype, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  image = (batch, height, width)
  return {
    "u": normal(*image, channels, dtype=dtype),
    "delta": normal(*image, channels, dtype=dtype),
    "A": -jnp.exp(normal(channels, states)),
    "B": normal(*image, states, dtype=dtype),
    "C": normal(*image, states, dtype=dtype),
    "D": normal(channels),
    "kernels": normal(3, 3, 3, channels),
    "alpha": normal(3),
    "delta_bias": normal(channels),
  }


# Interpreted kernels are long programs that run once.
@partial(
  jax.jit,
  static_argnums=0,
  compiler_options={"xla_backend_optimization_level": 0},
)
def value_and_gradients(implementation, arrays, g):
  y, pullback = jax.vjp(
    lambda arrays: smk.structure_aware_ssm(
      **arrays, implementation=implementation
    ),
    arrays,
  )
  return {"y": y, **pullback(g)[0]}


def assert_kernel_is_sequential(*shape, dtype=jnp.float32):
  arrays = arguments(*shape, dtype)
  rng = np.random.default_rng(1)
  g = jnp.asarray(rng.standard_normal(arrays["u"].shape), dtype)
  actual = value_and_gradients("mosaic_tpu", arrays, g)
  exact, exact_g = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, g))
  expected = value_and_gradients("sequential", exact, exact_g)
  assert actual.keys() == expected.keys()
  for name, wanted in expected.items():
    assert actual[name].dtype == arrays.get(name, g).dtype, name
    wanted = np.asarray(wanted)
    error = np.abs(np.asarray(actual[name], np.float32) - wanted).max()
    # Cotangents that vanish (of A for one token) are compared as they are.
    scale = max(np.abs(wanted).max(), 1e-6)
    assert error <= TOLERANCE[dtype] * scale, (name, error / scale)


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((1, 1, 1, 1, 1), jnp.float32),
    # Rows and columns that are both first and last.
    ((3, 2, 3, 6, 1), jnp.float32),
    ((3, 2, 3, 6, 1), jnp.bfloat16),
    # A group of images and a register filled up.
    ((9, 3, 4, 130, 2), jnp.bfloat16),
    # A ring that comes round.
    ((2, 13, 6, 4, 1), jnp.float32),
    # Tiles of several sizes.
    ((1, 2, 10, 4, 1), jnp.float32),
    ((1, 1, 5, 3, 16), jnp.float32),
  ],
  ids=str,
)
def test_values_and_gradients(interpreted, shape, dtype):
  assert_kernel_is_sequential(*shape, dtype=dtype)


def test_blocks_of_channels(interpreted, monkeypatch):
  """VMEM for 128 of 192 channels, so that the second block is half full."""
  cut = mosaic_tpu.Plan(group=2, block=128)
  monkeypatch.setattr(mosaic_tpu, "plan", lambda arrays: cut)
  assert_kernel_is_sequential(3, 2, 3, 192, 1)


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
def test_any_shape(interpreted, batch, height, width, channels, states):
  assert_kernel_is_sequential(batch, height, width, channels, states)


def test_plan_cuts_what_does_not_fit():
  def plan(batch, height, width, channels, states, dtype=jnp.bfloat16):
    u = jnp.empty((batch, height, width, channels), dtype)
    return mosaic_tpu.plan((u, u, jnp.empty((channels, states))))

  assert plan(128, 2, 56, 128, 1) == mosaic_tpu.Plan(8, 128)
  assert plan(3, 7, 7, 1024, 1) == mosaic_tpu.Plan(3, 1024)
  assert plan(128, 2, 56, 192, 1) == mosaic_tpu.Plan(8, 128)
  assert plan(8, 2, 320, 128, 1).group < 8
  with pytest.raises(NotImplementedError, match="1024 tokens and 16 states"):
    plan(8, 1, 1024, 128, 16)
  with pytest.raises(NotImplementedError, match="float16"):
    plan(1, 2, 2, 4, 1, dtype=jnp.float16)


@pytest.mark.parametrize(
  ("batch", "axis"), [(8, "data"), (7, "data"), (8, "pipeline")]
)
def test_a_mesh_that_cannot_be_split_is_left_to_xla(batch, axis):
  arrays = arguments(batch, 2, 2, 4, 1, jnp.float32)
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
    assert "shard_map" in program(None)
    return
  assert "pallas_call" not in program(None)
  with pytest.raises(NotImplementedError, match="a kernel"):
    program("mosaic_tpu")


def test_no_race_and_nothing_out_of_bounds(capsys):
  """TPU semantics: asynchronous copies, buffers, and memory that is not set."""
  arrays = arguments(2, 3, 4, 130, 1, jnp.float32)
  expected = smk.structure_aware_ssm(**arrays, implementation="sequential")
  with pltpu.force_tpu_interpret_mode(
    pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  ):
    actual = smk.structure_aware_ssm(**arrays, implementation="mosaic_tpu")
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  assert "RACE" not in capsys.readouterr().out  # JAX prints, and goes on.
