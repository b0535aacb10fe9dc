"""ONNX files compute what the models compute, with onnxruntime alone."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from jax import export

import spatial_mamba_jax as smj
from spatial_mamba_jax.export.__main__ import main
from spatial_mamba_jax.export.onnx_graph import Graph, computed
from spatial_mamba_jax.export.onnx_trace import convert
from spatial_mamba_jax.models.mixers import MIXERS

# Images of 12 x 11 tokens, which most mixers scan in two chunks and a rest.
SIZE = 48, 44
SMALL = 16, 24


def randomized(model, seed=0):
  """Returns the model with weights and statistics that are not trivial."""
  rng = np.random.default_rng(seed)

  def draw(x):
    if x.dtype != np.float32:
      return x
    return x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32)

  _, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
  nnx.update(model, jax.tree.map(draw, params))
  nnx.update(model, jax.tree.map(lambda x: abs(draw(x)), statistics))
  return model


def create(make=smj.create_model, name="spatial_mamba_micro", **overrides):
  settings = {"dims": (4, 8), "depths": (1, 2), **overrides}
  return randomized(make(name, rngs=nnx.Rngs(0), **settings))


def images_of(batch, size):
  shape = batch, *size, 3
  return np.random.default_rng(batch).normal(size=shape).astype(np.float32)


def session_of(path):
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  return onnxruntime.InferenceSession(str(path), options)


@nnx.jit
def apply(model, images):
  return model(images)


def assert_same(model, path, size):
  """Runs batches of two sizes by one file."""
  session = session_of(path)
  names = [x.name for x in session.get_outputs()]
  for batch in (1, 3):
    images = images_of(batch, size)
    expected = apply(model, images)
    if not isinstance(expected, list):
      assert names == ["logits"]
      expected = [expected]
    outputs = session.run(None, {"images": images})
    for output, values in zip(outputs, expected, strict=True):
      assert output.dtype == np.float32
      np.testing.assert_allclose(
        output, values, atol=1e-5 * float(abs(values).max()), rtol=0
      )


def all_nodes(graph):
  for node in graph.node:
    yield node
    for attribute in node.attribute:
      yield from all_nodes(attribute.g)


def check_file(content, model):
  """Checks the format, and that constants are little beside the weights."""
  onnx.checker.check_model(content, full_check=True)
  (opset,) = content.opset_import
  assert (opset.domain, opset.version >= 18) == ("", True)
  assert {node.domain for node in all_nodes(content.graph)} == {""}
  weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
  assert sum(len(x.raw_data) for x in content.graph.initializer) < (
    weights + 10_000
  )


NETWORKS = {
  "classifier": ({"num_classes": 3, "d_state": 2}, SIZE),
  "named implementations": (
    {"implementation": "associative", "layer_implementation": "xla"},
    (9, 5),
  ),
  "backbone": ({"make": smj.create_backbone, "out_indices": (0, 1)}, SMALL),
  "one feature": ({"make": smj.create_backbone, "out_indices": (1,)}, SMALL),
  "segmentor": (
    {
      "make": smj.create_segmentor,
      "num_classes": 3,
      "head_channels": 4,
      "auxiliary_channels": 2,
    },
    SMALL,
  ),
  "vmamba": ({"name": "vmamba_micro"}, SMALL),
  **{
    f"mixer {name}": (
      {"mixer": name, "dims": (8,), "depths": (2,)},
      (16, 16) if config.is_square else SIZE,
    )
    for name, config in MIXERS.items()
  },
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_computes_what_the_model_computes(tmp_path, name):
  settings, size = NETWORKS[name]
  model = create(**settings)
  path = tmp_path / "model.onnx"
  content = smj.export_onnx(model, path, image_size=size)
  assert_same(model, path, size)
  check_file(content, model)
