"""The entry points that users of timm know."""

import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.safetensors_file import write_safetensors
from spatial_mamba_jax.data import DataConfig, evaluation_batches, open_source
from spatial_mamba_jax.models import __main__ as listing
from spatial_mamba_jax.models.mixers import MIXERS
from spatial_mamba_jax.tasks.normalisation import normalise

SMALL = {"dims": (8, 16), "depths": (1, 1), "num_classes": 3}


@pytest.fixture(scope="module", params=["spatial_mamba_micro", "vmamba_micro"])
def model(request):
  model = smj.create_model(request.param, rngs=nnx.Rngs(0), **SMALL)
  model.name = request.param
  return model


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((2, 24, 32, 3)), jnp.float32)


def assert_same_weights(model, expected):
  tensors, expected = map(smj.convert.to_torch, (model, expected))
  assert tensors.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(tensors[name], x)


def test_names_are_filtered():
  assert smj.list_models("*tiny*") == ["spatial_mamba_tiny", "vmamba_tiny"]
  assert smj.list_models("vmamba_*") == [
    f"vmamba_{size}" for size in ("base", "micro", "small", "tiny")
  ]
  assert not smj.list_models("resnet*")


def test_the_forward_pass_in_parts(model, images):
  @nnx.jit
  def parts(model, images):
    features = model.forward_features(images)
    final, intermediates = model.forward_intermediates(images)
    return (
      model(images),
      features,
      model.forward_head(features),
      model.forward_head(features, pre_logits=True),
      final,
      intermediates,
      model.forward_intermediates(images, [-1])[1],
      model.forward_intermediates(images, 1)[1],
    )

  logits, features, head, pooled, final, all_stages, last, one = parts(
    model, images
  )
  assert model.num_features == 16
  assert features.shape == (2, 3, 4, 16)
  np.testing.assert_array_equal(head, logits)
  np.testing.assert_allclose(pooled, features.mean((1, 2)), rtol=1e-5)
  np.testing.assert_array_equal(final, features)
  info = model.feature_info
  assert [(x.stage, x.channels, x.stride) for x in info] == [
    (0, 8, 4),
    (1, 16, 8),
  ]
  for x, each in zip(all_stages, info, strict=True):
    size = (24 // each.stride, 32 // each.stride)
    assert x.shape == (2, *size, each.channels)
  np.testing.assert_allclose(model.norm(last[0]), features, atol=1e-6)
  np.testing.assert_array_equal(one[0], last[0])
  for wrong in (0, 3, [2], [-3], []):
    with pytest.raises(ValueError, match="must be some of the 2 stages"):
      model.forward_intermediates(images, wrong)


def test_the_head_is_replaced(model, images):
  model = nnx.clone(model)
  model.config = dataclasses.replace(model.config, class_names=("a", "b", "c"))
  before = model.forward_features(images)
  model.reset_classifier(7, rngs=nnx.Rngs(1))
  assert model(images).shape == (2, 7)
  assert model.config.num_classes == 7
  assert model.config.class_names == ()
  np.testing.assert_array_equal(model.forward_features(images), before)
  with pytest.raises(ValueError, match="num_classes must be at least 1"):
    model.reset_classifier(0, rngs=nnx.Rngs(1))


def test_pretrained_classifiers(model, images, tmp_path):
  smj.save_pretrained(model, tmp_path / "x")
  write_safetensors(tmp_path / "x.safetensors", smj.convert.to_torch(model))
  settings = {"dims": (8, 16), "depths": (1, 1)}
  for path in (tmp_path / "x", str(tmp_path / "x.safetensors")):
    found = smj.create_model(model.name, pretrained=path, **settings)
    assert type(found) is type(model)
    assert found.config.num_classes == 3
    assert_same_weights(found, model)
  found = smj.create_model(
    model.name,
    pretrained=path,
    num_classes=5,
    drop_path_rate=0.25,
    rngs=nnx.Rngs(3),
    **settings,
  )
  assert found(images).shape == (2, 5)
  assert found.config.drop_path_rate == 0.25
  np.testing.assert_array_equal(
    found.forward_features(images), model.forward_features(images)
  )
  for change, message in (
    ({"dims": (8, 32)}, r"its dims is \(8, 16\), not \(8, 32\)"),
    ({"mixer": "mamba"}, "its mixer is {'name': "),
    ({"num_classes": 4}, r"new weights are random: pass rngs=nnx.Rngs\(0\)"),
  ):
    with pytest.raises(ValueError, match=message):
      smj.create_model(
        model.name, pretrained=tmp_path / "x", **{**settings, **change}
      )
  other = {"s": "vmamba_micro", "v": "spatial_mamba_micro"}[model.name[0]]
  with pytest.raises(ValueError, match=f"is no {other} with these settings"):
    smj.create_model(other, pretrained=tmp_path / "x", **settings)
  with pytest.raises(ValueError, match="new weights are random"):
    smj.create_model(model.name)
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(ValueError, match="make a run a directory of them first"):
    smj.create_model(model.name, pretrained=tmp_path / "run")


def test_pretrained_backbones(model, images, tmp_path):
  settings = {"dims": (8, 16), "depths": (1, 1)}
  smj.save_pretrained(model, tmp_path / "classifier")
  segmentor = smj.create_segmentor(
    model.name,
    head_channels=8,
    auxiliary_channels=4,
    rngs=nnx.Rngs(2),
    **SMALL,
  )
  smj.save_pretrained(segmentor, tmp_path / "segmentor")
  smj.save_pretrained(segmentor.backbone, tmp_path / "backbone")

  def create(name, out_indices):
    return smj.create_backbone(
      model.name,
      pretrained=tmp_path / name,
      out_indices=out_indices,
      **settings,
    )

  backbone = create("classifier", (0, 1))
  _, expected = model.forward_intermediates(images)
  # Its norms have their initial values, scale 1 and bias 0.
  for x, y in zip(backbone(images), expected, strict=True):
    centred = y - y.mean(-1, keepdims=True)
    scale = jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(x, centred / scale, atol=2e-5)
  for name in ("segmentor", "backbone"):
    assert_same_weights(create(name, (0, 1)), segmentor.backbone)
    (last,) = create(name, (1,))(images)
    np.testing.assert_array_equal(last, segmentor.backbone(images)[1])
    with pytest.raises(ValueError, match=f"{name} without a classifier's head"):
      smj.create_model(model.name, pretrained=tmp_path / name, **settings)
  assert [x.stage for x in create("backbone", (1,)).feature_info] == [1]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_has_a_summary(mixer):
  model = nnx.eval_shape(
    lambda: smj.create_model(
      "spatial_mamba_micro", mixer=mixer, rngs=nnx.Rngs(0), **SMALL
    )
  )
  total = smj.summary(model, 32).total
  state = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert total.parameters == sum(x.size for x in state)
  assert total.macs > 0
  assert total.activations > 0


def test_a_summary_by_part():
  model = nnx.eval_shape(
    lambda: smj.create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
  )
  summary = smj.summary(model)
  assert summary.total.parameters == 26_748_862
  # As the authors' README has it.
  assert round(summary.total.macs / 1e9, 1) == 4.4
  head = summary.parts[-1]
  assert head == ("head", 513_000, 512_000, 1000)
  # Of the stem's convolutions, from 224 x 224 pixels on.
  stem = summary.parts[0]
  sizes = [(112, 32), (112, 32), (112, 32), (56, 256), (56, 64)]
  assert stem.activations == sum(side**2 * dim for side, dim in sizes)
  taps = [27, 288, 288, 288, 256]
  assert stem.macs == sum(
    side**2 * dim * each for (side, dim), each in zip(sizes, taps, strict=True)
  )
  lines = str(summary).splitlines()
  assert lines[0] == "SpatialMamba, 224 x 224 pixels"
  assert re.fullmatch(r"total +26,748,862 +4\.4\d\d +\d+\.\d\d", lines[-1])
  segmentor = nnx.eval_shape(
    lambda: smj.create_segmentor(
      "spatial_mamba_micro", rngs=nnx.Rngs(0), **SMALL
    )
  )
  parts = {part.name: part for part in smj.summary(segmentor, (32, 64)).parts}
  assert parts["auxiliary_head"].macs == 0
  assert parts["decode_head"].macs > parts["backbone.stages.0"].macs


def test_frozen_weights_stay(images):
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0), **SMALL)
  before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  chain = smj.freeze(optax.adamw(1e-2), "stem.*", "stages.0.*.A_log")
  optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, images):
    gradients = nnx.grad(lambda model: jnp.sum(model(images) ** 2))(model)
    optimizer.update(model, gradients)

  step(model, optimizer, images)
  after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  kept = {
    jax.tree_util.keystr(path, simple=True, separator=".")
    for (path, x), y in zip(
      jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    if np.array_equal(x, y)
  }
  paths = {
    jax.tree_util.keystr(path, simple=True, separator=".")
    for path, _ in jax.tree.leaves_with_path(before)
  }
  frozen = {x for x in paths if x.startswith("stem.")}
  assert kept == frozen | {"stages.0.blocks.0.mixer.A_log"}
  # Without their moments.
  moments = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
  assert len([x for x in moments if x.ndim]) == 2 * len(
    [x for x in jax.tree.leaves(before) if x.ndim]
  ) - 2 * len(kept)
  # In the order of the tree, which is not that of the paths.
  tree = {"a": [jnp.full(i + 1, i, jnp.float32) for i in range(12)]}
  chain = smj.freeze(optax.sgd(1.0), "a.1", "a.11")
  updates, _ = chain.update(tree, chain.init(tree), tree)
  for i, x in enumerate(updates["a"]):
    np.testing.assert_array_equal(x, np.full(i + 1, -i * (i not in (1, 11))))
  with pytest.raises(ValueError, match=r"no weight has a path like head\.x"):
    nnx.Optimizer(model, smj.freeze(optax.sgd(1.0), "head.x"), wrt=nnx.Param)


def test_the_transform_is_that_of_evaluation(tmp_path):
  config = DataConfig(image_size=20, test_crop_ratio=0.8)
  model = nnx.eval_shape(
    lambda: smj.create_model(
      "spatial_mamba_micro",
      preprocessing=config.preprocessing,
      rngs=nnx.Rngs(0),
      **SMALL,
    )
  )
  transform = smj.create_transform(model)
  rng = np.random.default_rng(0)
  (tmp_path / "val").mkdir()
  pixels = []
  for split in ("train", "val"):
    (tmp_path / split / "a").mkdir(parents=True)
    for i, size in enumerate(((30, 40), (21, 19), (64, 31))):
      pixels.append(rng.integers(0, 256, (*size, 3), np.uint8))
      image = Image.fromarray(pixels[-1])
      image.save(tmp_path / split / "a" / f"{i}.png")
  files = sorted((tmp_path / "val" / "a").iterdir())
  config.name, config.data_dir = "image_folder", str(tmp_path)
  source = open_source(config, "validation")
  (batch,) = evaluation_batches(source, config, batch_size=3)
  expected = normalise(jnp.asarray(batch["image"]))
  for images in (
    files,
    list(map(str, files)),
    [file.read_bytes() for file in files],
    pixels[3:],
    [Image.fromarray(x) for x in pixels[3:]],
  ):
    np.testing.assert_array_equal(transform(images), expected)
  np.testing.assert_array_equal(transform(files[1]), expected[1:2])
  np.testing.assert_array_equal(transform(pixels[5]), expected[2:])
  batch = np.stack([pixels[3]] * 2)
  np.testing.assert_array_equal(transform(batch), jnp.stack([expected[0]] * 2))
  np.testing.assert_array_equal(transform(jnp.asarray(batch)), transform(batch))
  (tmp_path / "x.png").write_bytes(b"not an image")
  with pytest.raises(ValueError, match=r"x\.png cannot be read: not an image"):
    transform(tmp_path / "x.png")
  with pytest.raises(ValueError, match=r"nothing\.png cannot be read"):
    transform(tmp_path / "nothing.png")
  model.config = dataclasses.replace(model.config, in_channels=1)
  with pytest.raises(ValueError, match="takes images of 1 channels"):
    smj.create_transform(model)


def test_every_row_for_users_of_timm(tmp_path, monkeypatch):
  page = pathlib.Path(__file__).parents[1] / "docs" / "timm.md"
  rows = re.findall(r"^\| `(.+)` \| `([^`]+)`.* \|$", page.read_text(), re.M)
  assert len(rows) == 25
  monkeypatch.chdir(tmp_path)
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0))
  smj.save_pretrained(model, "micro")
  images = jnp.zeros((1, 32, 32, 3))
  names = {
    "smj": smj,
    "nnx": nnx,
    "optax": optax,
    "model": model,
    "backbone": smj.create_backbone(
      "spatial_mamba_micro", pretrained="micro", out_indices=(1, 2)
    ),
    "images": images,
    "features": model.forward_features(images),
    "tensors": smj.convert.to_torch(model),
  }
  results = {}
  for timm, here in rows:
    if "org/name" in here:
      # tests/convert/test_hub.py calls it, with a server.
      assert "revision" in inspect.signature(smj.from_pretrained).parameters
    else:
      results[timm] = eval(here, names)
  assert results["timm.create_model(name)"](images).shape == (1, 10)
  assert results["…, num_classes=7"](images).shape == (1, 7)
  assert len(results["…, features_only=True, out_indices=(1, 2)"](images)) == 2
  assert results["model.feature_info.channels()"] == [32, 64]
  assert results["model.feature_info.reduction()"] == [8, 16]
  assert model(images).shape == (1, 7)  # Its head was replaced.


def test_the_list_of_models(capsys):
  assert listing.main(["*micro"]) == 0
  head, *lines = capsys.readouterr().out.splitlines()
  assert head.split()[:3] == ["name", "parameters", "GMAC"]
  assert [line.split()[0] for line in lines] == smj.list_models("*micro")
  assert lines[0].split()[1:3] == ["552,337", "0.13"]
  assert listing.main(["x*"]) == 2
  assert "no model has a name like x*" in capsys.readouterr().err
  names = set(listing.RELEASED)
  assert names == {x for x in smj.list_models() if "micro" not in x}


def test_importing_is_light():
  program = (
    "import sys, spatial_mamba_jax as smj; assert smj.__version__;"
    " print(*{x.split('.')[0] for x in sys.modules})"
  )
  done = subprocess.run(
    (sys.executable, "-c", program), capture_output=True, text=True, check=True
  )
  heavy = {
    *("PIL", "huggingface_hub", "matplotlib", "onnx", "orbax", "safetensors"),
    *("sklearn", "tensorflow_datasets", "tensorstore", "grain"),
  }
  assert not heavy & set(done.stdout.split())
