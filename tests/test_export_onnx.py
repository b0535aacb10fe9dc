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
  "backbone": ({"make": smj.create_backbone, "out_indices": (1,)}, SMALL),
  "segmentor": (
    {
      "make": smj.create_segmentor,
      "num_classes": 3,
      "head_channels": 4,
      "auxiliary_channels": 2,
    },
    SMALL,
  ),
  # More states a token than are scanned in chunks side by side.
  "many states": ({"mixer": "mamba", "dims": (36,), "depths": (1,)}, SIZE),
  "vmamba": ({"name": "vmamba_micro"}, SMALL),
  **{
    f"mixer {name}": (
      # One mixer turns its image from block to block.
      {"mixer": name, "dims": (8,), "depths": (4 if name == "evss" else 1,)},
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


def test_stacked_blocks_and_named_implementations(tmp_path):
  """A loop over the weights of alike blocks is unrolled."""
  settings = {"implementation": "associative", "layer_implementation": "xla"}
  model = create(depths=(3, 2), **settings)
  for stage in model.stages:
    stage.stack()
  path = tmp_path / "model.onnx"
  content = smj.export_onnx(model, path, image_size=(9, 5))
  assert_same(model, path, (9, 5))
  check_file(content, model)
  operators = [node.op_type for node in all_nodes(content.graph)]
  assert operators.count("Scan") == 5


def run_function(function, x):
  """Returns the results of a function by onnxruntime; its first axis is b."""
  (batch,) = export.symbolic_shape("b")
  shape = batch, *x.shape[1:]
  traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
  graph = Graph("x", batch)
  results = convert(graph, traced.jaxpr, traced.consts, [computed("x", shape)])
  outputs = [
    graph.info(graph.copy(graph.full(y, aval.shape)), aval.shape, aval.dtype)
    for y, aval in zip(results, traced.out_avals, strict=True)
  ]
  content = graph.model([graph.info("x", shape, jnp.float32)], outputs)
  onnx.checker.check_model(content, full_check=True)
  session = onnxruntime.InferenceSession(content.SerializeToString())
  return session.run(None, {"x": x}), content


def running_sum(x, *, reverse):
  def step(total, token):
    total = total + token
    return total, (total, token * 2)

  tokens = jnp.moveaxis(x, 1, 0)
  return jax.lax.scan(step, jnp.ones_like(x[:, 0]), tokens, reverse=reverse)


def operations(x):
  first, last = x[:, :1], x[:, -1:]
  repeated = jnp.repeat(first, 3, 1)
  return {
    "edge padding": [repeated, x, jnp.repeat(last, 2, 1)],
    "no edges": [repeated, x, jnp.repeat(x[:, -2:-1], 2, 1)],
  }, {
    "sum of a broadcast": repeated.sum(1),
    "transpositions": x.mT
    + x.mT * jnp.arange(5.0)[:, None]
    - x.sum(1)[..., None],
    "mixed orders": jnp.swapaxes(x.mT, 1, 2) * x + x[:, ::-1],
    "gather": x[:, np.array([3, 0, 0, 2])][..., np.array([4, 1])],
    "steps": jax.lax.rev(jax.lax.slice_in_dim(x, 1, 5, 2, axis=2), (1, 2)),
    "expm1": jnp.expm1(x * 1e-4),
    "log1p": jnp.log1p(jnp.exp(-abs(x) * 9)),
    "gelu": jax.nn.gelu(x, approximate=False),
    "no gelu": x * (0.5 + 0.25 * jax.lax.erf(x * 0.5**0.5)),
    "pieces": jnp.where(x > 0, x**3, jnp.minimum(x, -1)),
    "outer": jnp.einsum("bij,bik->bkj", x, x),
    "batch folded": x.reshape(-1, 5).sum(0, keepdims=True) / 7,
    "loop": running_sum(x, reverse=False),
    "loop from the end": running_sum(x, reverse=True),
    "twice": [x.reshape(-1, 2, 10)] * 2,
  }


def test_operations_agree_with_jax():
  def function(x):
    parts, others = operations(x)
    return {k: jnp.concatenate(v, 1) for k, v in parts.items()} | others

  x = images_of(2, (4, 5))[..., 0]
  outputs, content = run_function(lambda x: jax.tree.leaves(function(x)), x)
  expected, _ = jax.tree.flatten_with_path(function(x))
  for output, (path, values) in zip(outputs, expected, strict=True):
    np.testing.assert_allclose(output, values, rtol=2e-6, err_msg=str(path))
  operators = [node.op_type for node in all_nodes(content.graph)]
  assert (operators.count("Pad"), operators.count("Gelu")) == (1, 1)


def test_an_unknown_primitive_is_named(tmp_path):
  class Sorted(nnx.Module):
    def __call__(self, x):
      return jnp.sort(x)

  model = create()
  model.head = Sorted()
  with pytest.raises(NotImplementedError, match="the primitive sort"):
    smj.export_onnx(model, tmp_path / "x.onnx", image_size=16)
  assert not list(tmp_path.iterdir())


def test_a_wrong_call_is_explained_and_keeps_the_old_file(
  tmp_path, monkeypatch
):
  path = tmp_path / "old.onnx"
  path.write_text("old")

  def refuse(error, message, model, **options):
    with pytest.raises(error, match=message):
      smj.export_onnx(model, path, **options)

  refuse(ValueError, "not bfloat16: create", create(dtype="bfloat16"))
  model = create()
  refuse(ValueError, "image_size must be", model, image_size=(16, 0))
  refuse(ValueError, "images of one size", model, image_size=None)
  model.train()
  refuse(ValueError, "call model.eval", model)
  monkeypatch.setitem(sys.modules, "onnx", None)
  refuse(ImportError, "onnx is missing: pip install", create())
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_the_command(tmp_path, capsys):
  model = create(num_classes=3)
  smj.save_pretrained(model, tmp_path / "model")
  path = tmp_path / "model.onnx"
  arguments = [str(tmp_path / "model"), str(path)]
  assert main([*arguments, "--image_size=16x24"]) == 0
  assert "MiB: normalised images float32[batch,16,24,3] to logits float32[" in (
    capsys.readouterr().out
  )
  assert_same(model, path, SMALL)
  properties = session_of(path).get_modelmeta().custom_metadata_map
  assert properties["outputs"] == "logits"
  assert properties["mean"] == "0.485, 0.456, 0.406"
  assert properties["std"] == "0.229, 0.224, 0.225"
  before = path.read_bytes()
  assert main([*arguments, "--image_size=any"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("export: an ONNX file is for images of one size")
  assert path.read_bytes() == before
