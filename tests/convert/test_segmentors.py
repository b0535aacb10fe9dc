"""Segmentors in the files of mmsegmentation, in ours, and in runs."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.__main__ import convert
from spatial_mamba_jax.convert.architecture import (
  Heads,
  abstract_model,
  abstract_segmentor,
)
from spatial_mamba_jax.convert.families import table_of
from spatial_mamba_jax.convert.names import fitting_array, variables
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.weights import (
  load_model,
  load_weights,
  start_from,
)

HEADS = Heads(6, 4)


def filled(model, seed=0):
  rng = np.random.default_rng(seed)
  for _, variable in variables(model):
    values = rng.standard_normal(variable.shape)
    variable.set_value(jnp.asarray(values, variable.dtype))
  return model


def small_config():
  return get_model_config(
    "spatial_mamba_micro", dims=(4, 6), depths=(1, 2), num_classes=3
  )


@pytest.fixture(scope="module")
def segmentor():
  return filled(abstract_segmentor(small_config(), HEADS))


def authors_file(write_checkpoint, path, model, prefix=""):
  """A checkpoint as mmengine writes it: it names classes and functions."""
  tensors = smj.convert.to_torch(model)

  class Call:
    def __reduce__(self):
      return getattr, ("text", "upper")

  def make(modules):
    history = modules["mmengine"].HistoryBuffer()
    return {
      "meta": {"epoch": 1, "iter": 160_000, "function": Call()},
      "state_dict": {prefix + name: x for name, x in tensors.items()},
      "message_hub": {"log_scalars": {"loss": history}},
      "optimizer": {
        "state": {0: {"step": tensors["decode_head.conv_seg.bias"]}}
      },
    }

  return write_checkpoint(path, make)


def assert_same_tensors(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, name)


def pure(config, heads=HEADS):
  return PureModel(
    partial(smj.Segmentor, config, **heads._asdict(), statistics_group=2)
  )


def shapes_with_sharding(model):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    model.shapes,
  )


def test_the_authors_checkpoint_in_every_format(
  segmentor, write_checkpoint, tmp_path
):
  path = authors_file(
    write_checkpoint, tmp_path / "x.pth", segmentor, "module."
  )
  expected = smj.convert.to_torch(segmentor)
  for name in ("x.safetensors", "directory", "run/checkpoints/0"):
    report = convert(path, tmp_path / name)
    assert "Segmentor" in report
    assert "3 classes" in report
  model = smj.from_pretrained(tmp_path / "directory")
  assert isinstance(model, smj.Segmentor)
  assert model.channels == HEADS
  assert_same_tensors(smj.convert.to_torch(model), expected)
  card = (tmp_path / "directory" / "README.md").read_text()
  assert "UPerNet on a" in card
  assert "image-segmentation" in card
  network = pure(segmentor.config)
  like = shapes_with_sharding(network)
  for source in (
    path,
    *map(tmp_path.joinpath, ("x.safetensors", "directory", "run")),
  ):
    _, weights = load_weights(source, network, like)
    (weights, *_) = weights.values()
    found = smj.convert.to_torch(network.bind(weights))
    assert_same_tensors(found, expected)
  assert_same_tensors(smj.convert.to_torch(load_model(source)), expected)


def test_a_config_that_contradicts_the_weights(segmentor, tmp_path):
  smj.save_pretrained(segmentor, tmp_path / "x")
  config = tmp_path / "x" / "config.json"
  text = config.read_text()
  for old, new, message in (
    ('"head_channels": 6', '"head_channels": 7', "head_channels 7"),
    ('"num_classes": 3', '"num_classes": 4', "num_classes 4"),
    ('"auxiliary_channels": 4', '"out_indices": [0]', "both head_channels"),
  ):
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
      smj.from_pretrained(tmp_path / "x")
    assert "\n" not in str(error.value)


@pytest.mark.soak
def test_a_segmentor_starts_from_any_weights(
  segmentor, write_checkpoint, tmp_path
):
  """From a classifier, a backbone, and a segmentor of other classes."""
  config = dataclasses.replace(segmentor.config, num_classes=5)
  network = pure(config)
  fresh = network.weights_of(filled(abstract_segmentor(config, HEADS), 1))
  of_segmentor = authors_file(write_checkpoint, tmp_path / "x.pth", segmentor)
  classifier = filled(abstract_model(segmentor.config), 2)
  smj.save_pretrained(classifier, tmp_path / "classifier")
  smj.save_pretrained(segmentor.backbone, tmp_path / "backbone")
  own = smj.convert.to_torch(network.bind(fresh))
  for path, model in (
    (of_segmentor, segmentor),
    (tmp_path / "classifier", classifier),
    (tmp_path / "backbone", segmentor.backbone),
  ):
    weights, message = start_from(path, network, fresh)
    found = smj.convert.to_torch(network.bind(weights))
    source = smj.convert.to_torch(model)
    if model is not segmentor:
      source = {f"backbone.{name}": x for name, x in source.items()}
    for name, x in found.items():
      is_there = name in source and source[name].shape == x.shape
      expected = source if is_there else own
      np.testing.assert_array_equal(x, expected[name], name)
    assert is_there is (model is segmentor) or "auxiliary" in name
    assert "initialised at random" in message
    assert "\n" not in message
    if model is segmentor:
      assert "decode_head.classifier.linear" in message
      assert "decode_head.bottleneck" not in message
      assert "decode_head.conv_seg.bias" in message.partition("left out")[2]


def test_tensors_of_heads_that_fit(segmentor):
  """A file may lack a head, or have one of another shape."""
  tensors, table = smj.convert.to_torch(segmentor), table_of(segmentor)
  for path, variable in variables(segmentor):
    array = fitting_array(path, variable, tensors, table)
    np.testing.assert_array_equal(array, variable[...], path)
  path, variable = next(
    x for x in variables(segmentor) if x[0].endswith("conv.kernel")
  )
  (name,) = table.tensors(path)
  for wrong in ({}, {name: tensors[name][:1]}):
    assert fitting_array(path, variable, wrong, table) is None


def test_a_classifier_is_no_segmentor(segmentor, tmp_path):
  smj.save_pretrained(
    filled(abstract_model(segmentor.config)), tmp_path / "classifier"
  )
  network = pure(segmentor.config)
  with pytest.raises(TrainingError, match=r"a model other than config\.model"):
    load_weights(
      tmp_path / "classifier", network, shapes_with_sharding(network)
    )


def test_other_decode_heads_leave_a_backbone(segmentor, tmp_path):
  """Of a segmentor with another head, the backbone is read as before."""
  import safetensors.numpy

  tensors = smj.convert.to_torch(segmentor)
  del tensors["decode_head.bottleneck.conv.weight"]
  safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
  report = convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors")
  assert "Backbone" in report
  assert "left out" in report


@pytest.mark.soak
def test_export_of_a_segmentor(segmentor, tmp_path):
  from jax import export

  model = nnx.clone(segmentor)
  with pytest.raises(ValueError, match="images of one size"):
    smj.export_model(model, tmp_path / "x", image_size=None)
  smj.export_model(model, tmp_path / "x", image_size=(24, 20))
  program = export.deserialize(bytearray((tmp_path / "x").read_bytes()))
  images = jax.random.normal(jax.random.key(0), (2, 24, 20, 3))
  found = program.call(images)
  assert found.shape == (2, 24, 20, 3)
  # XLA may compile the same sums in another order.
  np.testing.assert_allclose(found, model(images), rtol=1e-3, atol=1e-3)
