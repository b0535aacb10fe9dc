"""Arguments of every operator, and the comparison with the sequential ones."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk
from spatial_mamba_kernels.depthwise_conv import api as conv_api
from spatial_mamba_kernels.depthwise_conv import xla as conv_xla
from spatial_mamba_kernels.drop_path import drop_path
from spatial_mamba_kernels.layer_norm import api as norm_api
from spatial_mamba_kernels.mlp import api as mlp_api


@pytest.fixture(autouse=True)
def refuse_promotion(strict):
  """As programs are run whose authors look for their own mistakes."""


# Sums of some hundred float32 terms; and the rounding of a result to bfloat16.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-8}


@pytest.fixture(scope="session")
def ssm_arguments():
  """(batch, height, width, channels, states, dtype, images=) -> {name: array}.

  `images` is the type of what has one number or more a pixel.
  """

  def arguments(
    batch, height, width, channels, n, dtype=jnp.float32, images=None
  ):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
      return jnp.asarray(rng.standard_normal(shape), dtype)

    image, kind = (batch, height, width), images or dtype
    return {
      "u": normal(*image, channels, dtype=kind),
      "delta": normal(*image, channels, dtype=kind),
      "A": -jnp.exp(normal(channels, n)),
      "B": normal(*image, n, dtype=kind),
      "C": normal(*image, n, dtype=kind),
      "D": normal(channels),
      "kernels": normal(3, 3, 3, channels),
      "alpha": normal(3),
      "delta_bias": normal(channels),
    }

  return arguments


@pytest.fixture(scope="session")
def fusion_arguments():
  """(shape of the image, dilations, its dtype) -> {name: array}."""

  def arguments(shape, dilations, dtype):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
      return jnp.asarray(rng.standard_normal(shape), dtype)

    count = len(dilations)
    return {
      "h": normal(*shape, dtype=dtype),
      "kernels": normal(count, 3, 3, shape[-1]),
      "alpha": normal(count),
    }

  return arguments


def _channels(numbers):
  """[C] as [1, 1, 1, C]."""
  return numbers[None, None, None]


def _depthwise_conv(
  x, kernel, bias=None, projection=None, *, form, implementation=None
):
  """By a kernel, or with XLA's convolution, which is none of ours.

  A projection follows after the channels.
  """
  if implementation != "sequential":
    if form == "plain":
      return conv_api.operator(1)((x, kernel), implementation)
    if form == "silu":
      return conv_api.silu_operator((x, kernel, bias), implementation)
    if form == "residual":
      return smk.residual_depthwise_conv(
        x, kernel, bias, implementation=implementation
      )
    results = smk.silu_depthwise_conv(
      x, kernel, bias, projection, implementation=implementation
    )
    return jnp.concatenate(results, axis=-1)
  y = conv_xla.grouped(x, kernel, stride=1)
  if form == "plain":
    return y
  if form == "residual":
    return x + (y + _channels(bias))
  y = jax.nn.silu(y + _channels(bias))
  if form == "silu":
    return y
  return jnp.concatenate((y, y @ projection), axis=-1)


@pytest.fixture(scope="session")
def convolution():
  """(shape of the image, its dtype, form) -> one, {name: array}.

  Projections are to so many `numbers`.
  """

  def arguments(shape, dtype, form="plain", numbers=6):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
      return jnp.asarray(rng.standard_normal(shape), dtype)

    kernel, x = normal(3, 3, shape[-1]), normal(*shape, dtype=dtype)
    arrays = {"x": x, "kernel": kernel}
    if form != "plain":
      arrays["bias"] = normal(shape[-1])
    if form == "projected":
      # Numbers that bfloat16 has, to which they may be cast; so small that what
      # they make is no greater than what it is made of, which is rounded first.
      projection = normal(shape[-1], numbers) * shape[-1] ** -0.5
      projection = projection.astype(jnp.bfloat16)
      arrays["projection"] = projection.astype(jnp.float32)
    return partial(_depthwise_conv, form=form), arrays

  return arguments


def _branch_scales(batch):
  """Of each image; the last one's branch is dropped."""
  return jnp.linspace(1.25, 0, batch)


def _mlp(x, w1, b1, w2, b2, residual, *, implementation=None):
  """By a kernel, or with JAX's GELU."""
  scale = _branch_scales(len(x))
  if implementation != "sequential":
    arrays = x, w1, b1, w2, b2, residual, scale
    return mlp_api.operator(arrays, implementation)
  with jax.default_matmul_precision("highest"):
    branch = jax.nn.gelu(x @ w1 + _channels(b1), approximate=False)
    branch = branch @ w2 + _channels(b2)
  return residual + drop_path(branch, scale)


@pytest.fixture(scope="session")
def perceptron():
  """(shape of the image, hidden units, its dtype) -> an MLP, {name: array}.

  Its weights are numbers that bfloat16 has, because it is cast to that.
  """

  def arguments(shape, hidden, dtype):
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
      numbers = jnp.asarray(rng.standard_normal(shape) * scale, jnp.bfloat16)
      return numbers.astype(jnp.float32)

    channels = shape[-1]
    return _mlp, {
      "x": normal(*shape).astype(dtype),
      "w1": normal(channels, hidden, scale=channels**-0.5),
      "b1": normal(hidden),
      "w2": normal(hidden, channels, scale=hidden**-0.5),
      "b2": normal(channels),
      "residual": normal(*shape).astype(dtype),
    }

  return arguments


def _residual_layer_norm(x, scale, bias, *, implementation=None):
  """By a kernel, or as its equation."""
  if implementation != "sequential":
    arrays = x, scale, bias
    return jnp.stack(norm_api.residual_operator(arrays, implementation))
  return jnp.stack((x, _layer_norm(x, scale, bias)))


def _gated_layer_norm(x, scale, bias, gate, *, implementation=None):
  """By a kernel, or as its equation."""
  branch_scale = _branch_scales(len(x))
  if implementation != "sequential":
    arrays = x, scale, bias, gate, branch_scale
    return norm_api.gated_operator(arrays, implementation)
  gated = _layer_norm(x, scale, bias) * jax.nn.silu(gate)
  return drop_path(gated, branch_scale)


def _layer_norm(x, scale, bias):
  centred = x - x.mean(-1, keepdims=True)
  var = jnp.square(centred).mean(-1, keepdims=True)
  return centred / jnp.sqrt(var + 1e-5) * _channels(scale) + _channels(bias)


@pytest.fixture(scope="session")
def normalisation():
  """(shape of the image, its dtype, is_gated=) -> one, {name: array}."""

  def arguments(shape, dtype, *, is_gated):
    rng = np.random.default_rng(0)

    def normal(*shape, dtype=jnp.float32):
      return jnp.asarray(rng.standard_normal(shape), dtype)

    arrays = {
      "x": 3 + normal(*shape, dtype=dtype),
      "scale": normal(shape[-1]),
      "bias": normal(shape[-1]),
    }
    if not is_gated:
      return _residual_layer_norm, arrays
    return _gated_layer_norm, arrays | {"gate": normal(*shape, dtype=dtype)}

  return arguments


@pytest.fixture(scope="session")
def every_operator():
  """Each operator with its arguments, taken from those of the fused one."""

  def operators(whole):
    tokens = {
      name: whole[name].reshape(len(whole[name]), -1, whole[name].shape[-1])
      for name in ("u", "delta", "B")
    }
    parameters = {name: whole[name] for name in ("A", "delta_bias")}
    stencil = {name: whole[name] for name in ("kernels", "alpha")}
    return (
      (smk.structure_aware_ssm, whole),
      (smk.selective_scan, {**tokens, **parameters}),
      (smk.state_fusion, {"h": whole["u"], **stencil}),
    )

  return operators


@pytest.fixture(scope="session")
def cotangent():
  """(operator, arrays) -> what to pull back, random."""

  def random(operator, arrays):
    rng = np.random.default_rng(1)
    result = jax.eval_shape(lambda arrays: operator(**arrays), arrays)
    return jnp.asarray(rng.standard_normal(result.shape), result.dtype)

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
    sums = 2**-24 * math.prod(g.shape[:-1]) ** 0.5
    tolerance = max(TOLERANCE[dtype], sums)
    for name, wanted in expected.items():
      assert actual[name].dtype == arrays.get(name, g).dtype, name
      wanted = np.asarray(wanted)
      error = np.abs(np.asarray(actual[name], np.float32) - wanted).max()
      # Cotangents that vanish (of A for one token) are compared as they are.
      scale = max(np.abs(wanted).max(), 1e-6)
      assert error <= tolerance * scale, (name, error / scale)

  return check
