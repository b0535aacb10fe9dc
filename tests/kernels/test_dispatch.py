"""Which platform an operator is traced for, and which it is lowered for."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spatial_mamba_kernels.case import Sizes
from spatial_mamba_kernels.cases import CASES
from spatial_mamba_kernels.dispatch import traced_for
from spatial_mamba_kernels.gpu import device as gpu_device

# Of tiny's first stage.
SIZES = Sizes(128, 56, 56, 128)
each_operator = pytest.mark.parametrize("case", CASES, ids=lambda x: x.name)


@pytest.fixture
def trace_for(monkeypatch):
  """Makes a platform's device JAX's default one, as far as kernels ask."""

  def platform(name):
    if name == "cuda":
      hopper = types.SimpleNamespace(compute_capability="9.0")
      monkeypatch.setattr(gpu_device, "get_default_device", lambda: hopper)
    assert traced_for() == name
    jax.clear_caches()

  yield platform
  jax.clear_caches()


def pulled_back(function, arrays):
  """The result, and the cotangents of all arguments."""
  y, pullback = jax.vjp(lambda arrays: function(**arrays), arrays)
  return y, pullback(jax.tree.map(jnp.cos, y))


def kernels(function, shapes, platform):
  """How many a program has that is traced here, and lowered for a platform."""
  traced = jax.jit(partial(pulled_back, function)).trace(shapes)
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  return program.count("@mosaic_gpu_v2")


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@each_operator
def test_tracing_chooses_for_those_that_say_so_alone(case, trace_for, platform):
  """All others have the kernel of the platform that they are lowered for."""
  trace_for(platform)
  shapes = case.shapes(SIZES, "bfloat16")
  is_candidate = platform == "cuda" or not case.operator.is_chosen_in_tracing
  expected = sum(case.gpu_kernels) if is_candidate else 0
  assert kernels(case.function, shapes, "cuda") == expected
  assert kernels(case.function, shapes, "cpu") == 0


@each_operator
def test_a_named_kernel_is_not_chosen(case):
  """It is lowered for its platform, whatever the program is traced for."""
  shapes = case.shapes(SIZES, "bfloat16")
  named = partial(case.function, implementation="mosaic_gpu")
  assert kernels(named, shapes, "cuda") == sum(case.gpu_kernels)


@each_operator
def test_values_do_not_depend_on_what_a_program_is_traced_for(case, trace_for):
  """Traced for a GPU, lowered for a CPU: what is saved is that of a kernel."""
  rng = np.random.default_rng(0)

  def normal(shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  # The MLP's kernels are of bfloat16 alone.
  dtype = jnp.float32 if case.is_for_every_gpu else jnp.bfloat16
  arrays = case.draw(normal, Sizes(2, 3, 4, 64), dtype)
  run = jax.jit(partial(pulled_back, case.function))
  expected = run(arrays)
  trace_for("cuda")
  actual = jax.jit(partial(pulled_back, case.function))(arrays)
  tolerance = 2e-5 if dtype == jnp.float32 else 2**-6

  def compare(actual, expected):
    expected = np.asarray(expected, np.float32)
    error = np.abs(np.asarray(actual, np.float32) - expected).max()
    assert error <= tolerance * np.abs(expected).max()

  jax.tree.map(compare, actual, expected)
