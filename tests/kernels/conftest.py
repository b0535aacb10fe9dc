"""Arguments of every operator, and the comparison with the sequential ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spatial_mamba_kernels.case import Sizes
from spatial_mamba_kernels.cases import CASES, by_name
from spatial_mamba_kernels.depthwise_conv.cases import strided_case
from spatial_mamba_kernels.state_fusion import cases as state_fusion


@pytest.fixture(autouse=True)
def refuse_promotion(strict):
  """As programs are run whose authors look for their own mistakes."""


# Sums of some hundred float32 terms; and the rounding of a result to bfloat16.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}


def draw(case, sizes, dtype, **options):
  """Random arguments; all of them in float64 where images are."""
  rng = np.random.default_rng(0)

  def normal(shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  arrays = case.draw(normal, Sizes(*sizes), dtype, **options)
  if dtype == jnp.float64:
    return {name: x.astype(dtype) for name, x in arrays.items()}
  return arrays


def named(case):
  """The operator; "sequential" is its reference, which shares no code."""

  def run(*, implementation=None, **arrays):
    if implementation == "sequential":
      return case.reference(**arrays)
    return case.function(**arrays, implementation=implementation)

  return run


@pytest.fixture(scope="session")
def ssm_arguments():
  """(B, H, W, D, N, dtype of images) -> {name: array}."""

  def arguments(*sizes, images=jnp.float32):
    return draw(by_name("structure_aware_ssm"), sizes, images)

  return arguments


@pytest.fixture(scope="session")
def scan_read_out():
  """(B, L, D, N, dtype of images) -> the selective SSM, {name: array}."""

  def arguments(batch, length, channels, states, images=jnp.float32):
    case = by_name("selective_ssm")
    sizes = batch, 1, length, channels, states
    return named(case), draw(case, sizes, images)

  return arguments


@pytest.fixture(scope="session")
def fusion_arguments():
  """(shape of the image, dilations, its dtype) -> {name: array}."""

  def arguments(shape, dilations, dtype):
    return draw(state_fusion.case(dilations), shape, dtype)

  return arguments


@pytest.fixture(scope="session")
def convolution():
  """(shape of the image, its dtype, form) -> one, {name: array}.

  Projections are to so many `numbers`.
  """

  def arguments(shape, dtype, form="plain", numbers=6):
    is_plain, is_projected = form == "plain", form == "projected"
    case = by_name("depthwise_conv" if is_plain else f"{form}_depthwise_conv")
    options = {"projected": numbers} if is_projected else {}
    return named(case), draw(case, shape, dtype, **options)

  return arguments


@pytest.fixture(scope="session")
def strided_convolution():
  """(shape of the image, its dtype, stride) -> one, {name: array}."""

  def arguments(shape, dtype, stride=2):
    case = strided_case(stride)
    return named(case), draw(case, shape, dtype)

  return arguments


@pytest.fixture(scope="session")
def perceptron():
  """(shape of the image, hidden units, its dtype) -> an MLP, {name: array}."""

  def arguments(shape, hidden, dtype):
    case, (*pixels, channels) = by_name("mlp"), shape
    sizes = *pixels, 2 * channels
    return named(case), draw(case, sizes, dtype, hidden=hidden)

  return arguments


@pytest.fixture(scope="session")
def normalisation():
  """(shape of the image, its dtype, is_gated=) -> one, {name: array}."""

  def arguments(shape, dtype, *, is_gated):
    case = by_name(f"{'gated' if is_gated else 'residual'}_layer_norm")
    return named(case), draw(case, shape, dtype)

  return arguments


@pytest.fixture(scope="session")
def every_operator():
  """(sizes, dtype of images) -> the SSM and its parts, with arguments."""

  def operators(*sizes, images=jnp.float32):
    names = "structure_aware_ssm", "selective_scan", "state_fusion"
    cases = map(by_name, names)
    return [(case.function, draw(case, sizes, images)) for case in cases]

  return operators


@pytest.fixture(scope="session")
def tpu_operators():
  """(sizes, dtype of images) -> {name: one with a TPU kernel, arguments}."""

  def operators(*sizes, images=jnp.float32):
    return {
      case.name: (case.function, draw(case, sizes, images))
      for case in CASES
      if "mosaic_tpu" in case.operator.kernels
    }

  return operators


@pytest.fixture(scope="session")
def cotangent():
  """(operator, arrays) -> what to pull back, random."""

  def random(operator, arrays):
    rng = np.random.default_rng(1)
    result = jax.eval_shape(lambda arrays: operator(**arrays), arrays)
    return jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), result
    )

  return random


@pytest.fixture(scope="session")
def value_and_gradients():
  """(operator, arrays, cotangent) -> {name: array}, compiled."""

  def run(operator, arrays, g):
    y, pullback = jax.vjp(lambda arrays: operator(**arrays), arrays)
    return {"result": y, **pullback(g)[0]}

  # Interpreted kernels are long programs that run once.
  options = {"xla_backend_optimization_level": 0}
  return jax.jit(
    run,
    static_argnums=0,
    compiler_options=options if jax.default_backend() == "cpu" else None,
  )


@pytest.fixture(scope="session")
def assert_is_sequential(cotangent, value_and_gradients):
  """Values and every gradient, of arrays whose first is of the result's type.

  The states of a scan are float32 whatever comes in.
  """

  def check(implementation, operator, arrays, dtype=jnp.float32):
    kernel = partial(operator, implementation=implementation)
    g = cotangent(kernel, arrays)
    actual = value_and_gradients(kernel, arrays, g)
    exact, exact_g = jax.tree.map(lambda x: x.astype(jnp.float32), (arrays, g))
    sequential = partial(operator, implementation="sequential")
    expected = value_and_gradients(sequential, exact, exact_g)
    assert actual.keys() == expected.keys()
    # Roundings of a sum over pixels, one after the other, wander.
    sums = 2**-24 * math.prod(jax.tree.leaves(g)[0].shape[:-1]) ** 0.5
    tolerance = max(TOLERANCE[dtype], sums)

    for name, like in {"result": g, **arrays}.items():
      # Of results that come together, one may be made of the other, rounded.
      # Cotangents that vanish (of A for one token) are compared as they are.
      leaves = map(np.asarray, jax.tree.leaves(expected[name]))
      scale = max(1e-6, *(np.abs(wanted).max() for wanted in leaves))

      def compare(actual, wanted, like, name=name, scale=scale):
        assert actual.dtype == like.dtype, name
        error = np.abs(np.asarray(actual, np.float32) - np.asarray(wanted))
        assert error.max() <= tolerance * scale, (name, error.max() / scale)

      jax.tree.map(compare, actual[name], expected[name], like)

  return check
