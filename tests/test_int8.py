"""Networks that multiply int8."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

import spatial_mamba_jax as smj
from spatial_mamba_jax.export import int8


def products(function, *arguments):
  """Counts the products of a function by their operands' dtype."""
  counts = collections.Counter()

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      name = equation.primitive.name
      if name in ("dot_general", "conv_general_dilated"):
        is_depthwise = equation.params.get("feature_group_count", 1) > 1
        dtypes = {x.aval.dtype.name for x in equation.invars}
        size = equation.invars[0].aval.size * equation.invars[1].aval.size
        if not is_depthwise and size > 1:
          counts[dtypes.pop()] += 1
      for inner in jaxprs_in_params(equation.params):
        walk(inner)

  walk(jax.make_jaxpr(function)(*arguments).jaxpr)
  return counts


def create(family, **overrides):
  model = smj.create_model(
    f"{family}_micro",
    dims=(8, 16),
    depths=(1, 1),
    rngs=nnx.Rngs(0),
    **overrides,
  )
  # Fresh heads are almost 0.
  kernel = model.head.kernel
  kernel.set_value(jax.random.normal(jax.random.key(1), kernel.shape))
  return model


def images_of(*shape):
  images = np.random.default_rng(0).standard_normal((*shape, 3))
  return jnp.asarray(images, jnp.float32)


def test_a_product_is_rounded_as_defined():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 5)).astype(np.float32)
  weight = rng.standard_normal((5, 4)).astype(np.float32)
  x[1, 2] = 0  # Has no scale.

  def quantized(x):
    traced = jax.make_jaxpr(lambda x: x @ weight)(x)
    (result,) = int8._evaluate(traced.jaxpr, traced.consts, [x])
    return result

  x_scale = np.abs(x).max(-1, keepdims=True) / 127
  x_scale[x_scale == 0] = 1
  weight_scale = np.abs(weight).max(0) / 127
  one = np.round(x / x_scale).astype(np.int64)
  other = np.round(weight / weight_scale).astype(np.int64)
  np.testing.assert_allclose(
    jax.jit(quantized)(x),
    (one @ other) * x_scale * weight_scale,
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  ("family", "mixer"),
  [("spatial_mamba", "spatial_mamba"), ("vmamba", "linear_attention")],
)
def test_all_products_with_weights_are_int8(family, mixer):
  model, images = create(family, mixer=mixer), images_of(2, 24, 16)
  quantized = smj.quantize(model)
  counts = products(quantized.traced, images)
  # Linear attention has products of activations; the others are scales'.
  before = products(lambda images: model(images), images)
  of_activations = {"spatial_mamba": 0, "linear_attention": 6}[mixer]
  assert counts["int8"] == before["float32"] - of_activations
  expected = nnx.jit(lambda model, x: model(x))(model, images)
  logits = quantized(images)
  error = jnp.abs(logits - expected).max() / jnp.abs(expected).max()
  assert 1e-5 < error < 0.05


def test_exported_files_are_smaller(tmp_path):
  model, images = create("spatial_mamba"), images_of(2, 16, 16)
  expected = smj.quantize(model)(images)
  sizes = {}
  for is_int8 in (False, True):
    path = tmp_path / f"{is_int8}.stablehlo"
    exported = smj.export_model(model, path, image_size=16, int8=is_int8)
    sizes[is_int8] = path.stat().st_size
  assert sizes[True] < 0.8 * sizes[False]
  np.testing.assert_allclose(exported.call(images), expected, rtol=1e-4)
  path = tmp_path / "x.onnx"
  content = smj.export_onnx(model, path, image_size=16, int8=True)
  operators = collections.Counter(x.op_type for x in content.graph.node)
  assert operators["MatMulInteger"] > 10
  assert {x.domain for x in content.graph.node} == {""}
  session = onnxruntime.InferenceSession(path)
  (logits,) = session.run(None, {"images": np.asarray(images)})
  exact = np.asarray(model(images))
  assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_training_is_not_quantized():
  model = create("spatial_mamba")
  model.train()
  with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
    smj.quantize(model)
