"""Segmentation trains and predicts as mmsegmentation does."""

import dataclasses
import itertools
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.data.label_maps import IGNORED
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.heads.resampling import bilinear
from spatial_mamba_jax.models.heads.upernet import UPerHead
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.segmentor import HeadLogits, Segmentor
from spatial_mamba_jax.tasks.segmentation import SegmentationConfig, strips
from spatial_mamba_jax.tasks.segmentation.inference import (
  Windows,
  predict_views,
  slide,
)
from spatial_mamba_jax.tasks.segmentation.losses import EPSILON, pixel_loss
from spatial_mamba_jax.tasks.segmentation.task import Prepared
from spatial_mamba_jax.training.config import OptimizerConfig
from spatial_mamba_jax.training.optimizer import decays, make_schedule
from tests.models.test_segmentor import TABLE, variables

MEAN = np.array([123.675, 116.28, 103.53])
DEVIATION = np.array([58.395, 57.12, 57.375])


class Toy(nnx.Module):
  """The small segmentor of the golden vectors."""

  def __init__(self, *, rngs):
    def conv(features_in, features_out):
      return nnx.Conv(
        *(features_in, features_out, (3, 3)),
        strides=2,
        padding=1,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=rngs,
      )

    dims = (4, 4, 8, 12, 16)
    self.stem = conv(3, 4)
    self.stages = nnx.List([conv(a, b) for a, b in itertools.pairwise(dims)])
    self.decode_head = UPerHead(
      dims[1:], 8, 7, dropout_rate=0.0, dtype="float64", rngs=rngs
    )

  def __call__(self, x):
    x, features = self.stem(x), []
    for stage in self.stages:
      x = stage(jax.nn.relu(x))
      features.append(x)
    return self.decode_head(features)


@pytest.fixture(scope="module")
def toy(golden):
  """Returns the jitted network; call it in float64."""
  weights = {
    name.removeprefix("w/").removeprefix("backbone."): x
    for name, x in golden("segmentation/infer").items()
    if name.startswith("w/")
  }
  with jax.enable_x64(True):
    model = nnx.eval_shape(lambda: Toy(rngs=nnx.Rngs(0)))
    for path, variable in variables(model):
      if path.startswith("decode_head"):
        layout = TABLE.layout(path, variable.ndim)
        tensors = [weights[name] for name in TABLE.tensors(path)]
        array = layout.from_torch(tensors)
      else:
        array = weights[path.replace("kernel", "weight")]
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
      variable.set_value(jnp.asarray(array, variable.dtype))
    model.eval()
  return model


def normalised(bgr):
  """[3, H, W] of BGR bytes to [1, H, W, 3]."""
  rgb = bgr[::-1].transpose(1, 2, 0)
  return jnp.asarray((rgb - MEAN) / DEVIATION)[None]


def assert_same_labels(found, expected, probabilities):
  """Labels may differ where two classes score alike, to float32's rounding."""
  top = np.sort(probabilities, axis=0)
  is_sure = top[-1] - top[-2] > 1e-5 * np.abs(probabilities).max()
  assert is_sure.mean() > 0.99
  np.testing.assert_array_equal(found[is_sure], expected[is_sure])


def test_sliding_windows_are_the_authors(golden, toy, x64):
  expected = golden("segmentation/infer")
  images = jnp.asarray(expected["slide_img"].transpose(0, 2, 3, 1))
  found = jax.jit(lambda x: slide(toy, x, Windows(64, 40)))(images)
  scale = np.abs(expected["slide_logits"]).max()
  # The vectors are stored in float32.
  error = np.asarray(found).transpose(0, 3, 1, 2) - expected["slide_logits"]
  assert np.abs(error).max() <= 1e-6 * scale


def test_a_small_image_is_one_window(toy, x64):
  images = jax.random.normal(jax.random.key(0), (1, 40, 70, 3), "float64")
  found = jax.jit(lambda x: slide(toy, x, Windows(96, 40)))(images)
  logits = jax.jit(lambda x: toy(x))(images)
  rows, columns = bilinear(20 // 2, 40), bilinear(18, 70)
  expected = jnp.einsum("ph,qw,bhwk->bpqk", rows, columns, logits)
  np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["whole", "tta"])
def test_label_maps_are_the_authors(golden, toy, x64, monkeypatch, kind):
  """A view resized twice; and the mean probability of six views."""
  expected = golden("segmentation/infer")
  if kind == "whole":
    views = [expected["whole_bgr"]]
  else:
    views = [expected[f"tta_bgr_{ratio}"] for ratio in ("0.75", "1.0", "1.25")]
  height, width = map(int, expected[f"{kind}_ori_shape"])
  # Several strips, the last one shorter.
  monkeypatch.setattr(strips, "_MOST_LOGITS", 11 * (width + 5) * 7)

  @jax.jit
  def predict(views, sizes):
    flip = kind == "tta"
    return predict_views(toy, views, sizes, height + 3, width + 5, flip=flip)

  found = predict(
    [normalised(view) for view in views], jnp.array([[height, width]])
  )
  name = {"whole": "whole_logits", "tta": "tta_prob"}[kind]
  assert_same_labels(
    np.asarray(found)[0, :height, :width],
    expected[f"{kind}_pred"][0],
    expected[name],
  )


def test_images_of_a_batch_have_sizes_of_their_own(toy, x64):
  images = jax.random.normal(jax.random.key(0), (2, 48, 64, 3), "float64")
  sizes = jnp.array([[50, 61], [37, 90]])

  @partial(jax.jit, static_argnums=(2, 3))
  def predict(images, sizes, height, width):
    return predict_views(toy, [images], sizes, height, width)

  together = predict(images, sizes, 50, 90)
  for i, (height, width) in enumerate(sizes.tolist()):
    alone = predict(images[i : i + 1], sizes[i : i + 1], height, width)
    np.testing.assert_array_equal(together[i, :height, :width], alone[0])


def test_the_loss_does_not_depend_on_the_strips(x64, monkeypatch):
  """Also its gradient; against the formula on logits of the whole size."""
  keys = jax.random.split(jax.random.key(0), 2)
  logits = jax.random.normal(keys[0], (2, 5, 7, 3), "float64")
  labels = jax.random.randint(keys[1], (2, 19, 26), -1, 3).astype(jnp.int16)

  def direct(logits):
    rows, columns = bilinear(5, 19), bilinear(7, 26)
    resized = jnp.einsum("ph,qw,bhwk->bpqk", rows, columns, logits)
    likelihoods = jax.nn.log_softmax(resized)
    target = jax.nn.one_hot(labels, 3, dtype="float64")  # 0 where ignored.
    return -jnp.sum(likelihoods * target) / (labels.size + EPSILON)

  expected = jax.value_and_grad(direct)(logits)
  for rows in (1, 4, 19):
    monkeypatch.setattr(strips, "_MOST_LOGITS", rows * 26 * 3)
    # A new function, because the number of rows is a constant of the program.
    value = jax.jit(jax.value_and_grad(lambda x: pixel_loss(x, labels).value))
    found = value(logits)
    for x, y in zip(found, expected, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_a_batch_without_labels_has_no_loss():
  labels = jnp.full((1, 8, 8), IGNORED, jnp.int16)
  loss = pixel_loss(jnp.ones((1, 2, 2, 3)), labels)
  assert loss.value == 0
  assert loss.accuracy == 1  # As mmsegmentation's, by its epsilons.


class Fixed(Segmentor):
  """A network with random logits, whatever the image."""

  def __init__(self, seed):
    self.seed = seed

  def head_logits(self, images, *, rngs=None):
    decode, auxiliary = jax.random.split(jax.random.key(self.seed))
    return HeadLogits(
      jax.random.normal(decode, (2, 3, 4, 5), "float64"),
      jax.random.normal(auxiliary, (2, 2, 2, 5), "float64"),
    )

  def decode_logits(self, images, *, rngs=None):
    return self.head_logits(images).decode


def test_mesa_compares_with_the_teacher(x64):
  """By the cross-entropy of the decode head, at its own resolution."""
  config = SegmentationConfig(num_classes=5)
  task = config.create(
    get_model_config("spatial_mamba_micro"),
    DataConfig(name="digit_scenes"),
    mesa_weight=0.3,
  )
  labels = jnp.arange(2 * 9 * 16).reshape(2, 9, 16) % 5
  batch = Prepared(jnp.zeros((2, 9, 16, 3)), labels.astype(jnp.int16))
  student, other, key = Fixed(0), Fixed(1), jax.random.key(0)
  teacher = task.teach(other, batch)
  plain, with_teacher = (
    task.loss(student, batch, key, x).value for x in (None, teacher)
  )
  likelihoods = jax.nn.log_softmax(student.decode_logits(batch.images))
  probabilities = jax.nn.softmax(other.decode_logits(batch.images))
  expected = -0.3 * jnp.mean(jnp.sum(probabilities * likelihoods, -1))
  np.testing.assert_allclose(with_teacher - plain, expected, rtol=1e-12)


def recipe():
  import configs.ade20k_upernet_tiny

  return configs.ade20k_upernet_tiny.get_config()


def test_learning_rate_is_the_authors(golden, x64):
  config = recipe()
  schedule = make_schedule(
    config.optimizer, batch_size=16, warmup_steps=1500, steps=160_000
  )
  expected = golden("segmentation/learning_rate")
  found = [schedule(jnp.asarray(i)) for i in expected["lr_iter"]]
  np.testing.assert_allclose(found, expected["lr"], rtol=1e-9, atol=1e-18)


def test_decay_groups_are_the_authors(golden):
  from spatial_mamba_jax.convert.families import table_of
  from spatial_mamba_jax.models.pure import PureModel, first_block

  config = recipe()
  model = PureModel(config.create_task().network)
  table = table_of(model.abstract())
  names = golden("segmentation/tiny_names")
  decay = dict(zip(names["name"], names["weight_decay"], strict=True))
  found = decays(config.optimizer.undecayed, model)
  assert found.keys() == model.shapes.params.keys()
  for path, is_decayed in found.items():
    for name in table.tensors(first_block(path)):
      assert is_decayed == (decay[name] == 0.01), name
  assert config.optimizer.weight_decay == 0.01


def test_a_mixer_of_square_images_is_refused():
  config, data = SegmentationConfig(), DataConfig(name="digit_scenes")
  for is_aligned in (False, True):
    model = get_model_config(
      "spatial_mamba_micro", mixer="v2m", aligned=is_aligned
    )
    if is_aligned:
      assert config.create(model, data, mesa_weight=0.0)
    else:
      with pytest.raises(UserError, match="takes square images alone"):
        config.create(model, data, mesa_weight=0.0)


def test_the_crop_of_a_classifier_is_refused():
  with pytest.raises(UserError, match="image_size has no effect on the eval"):
    recipe().set_for_evaluation("image_size", 640)


def test_groups_of_statistics_fill_a_batch():
  config = recipe()
  config.task.statistics_group, config.accumulation_steps = 4, 2
  config.validate()
  config.accumulation_steps = 8
  with pytest.raises(UserError) as caught:
    config.validate()
  assert str(caught.value) == (
    "config.task.statistics_group must be a divisor of batch_size /"
    " accumulation_steps = 2, or None, got 4"
  )


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_recipes_are_valid(size):
  import importlib

  config = importlib.import_module(f"configs.ade20k_upernet_{size}")
  config = config.get_config()
  config.validate()
  assert config.model.name == f"spatial_mamba_{size}"
  defaults = OptimizerConfig()
  assert dataclasses.replace(config.optimizer) != defaults


@pytest.mark.soak
def test_a_run_evaluates_every_scene_and_resumes(tmp_path, capsys):
  """Scenes of two shapes; a run in two parts ends like one in one part."""
  from spatial_mamba_jax.training.config import ModelSection, TrainConfig
  from spatial_mamba_jax.training.evaluation import evaluate_checkpoint
  from spatial_mamba_jax.training.loop import train
  from spatial_mamba_jax.training.weights import read_checkpoint

  def config():
    return TrainConfig(
      task=SegmentationConfig(
        num_classes=11,
        head_channels=8,
        auxiliary_channels=6,
        box=(96, 64),
        statistics_group=2,
        test_flip=True,
      ),
      model=ModelSection(dims=(8, 8), depths=(1, 1), drop_path_rate=0.1),
      data=DataConfig(name="digit_scenes", image_size=64),
      optimizer=OptimizerConfig(
        schedule="linear", undecayed="norms", warmup="2 steps"
      ),
      batch_size=4,
      length="6 steps",
      evaluation_batch_size=8,
      evaluate_every="6 steps",
      checkpoint_every="3 steps",
      log_every="3 steps",
      ema_decay=0.0,
    )

  evaluation = train(config(), tmp_path / "whole")
  assert evaluation is not None
  assert evaluation.values["images"] == 100
  assert (tmp_path / "whole" / "examples.png").stat().st_size > 1000
  half = tmp_path / "half"
  shutil.copytree(tmp_path / "whole", half)
  shutil.rmtree(half / "checkpoints" / "6")
  again = train(config(), half)
  assert again == evaluation
  first, second = (
    read_checkpoint(tmp_path / name / "checkpoints" / "6").whole
    for name in ("whole", "half")
  )
  assert first.keys() == second.keys()
  for name, x in first.items():
    np.testing.assert_array_equal(x, second[name], name)
  found = evaluate_checkpoint(config(), half, tmp_path / "out")
  # Without a moving average both would be the same.
  assert found.evaluations == {"ema": evaluation}
  assert "100 records of 2 shapes" in capsys.readouterr().err
  assert len(list((tmp_path / "out" / "ema" / "maps").rglob("*.png"))) == 100


def test_a_prepared_batch_is_the_authors(golden):
  """Small crops are padded with the mean colour, whatever lies there."""
  expected = golden("segmentation/preprocessor")
  images = np.full((2, 64, 64, 3), 77, np.uint8)
  labels = np.full((2, 64, 64), IGNORED, np.int16)
  sizes = []
  for i in range(2):
    bgr, label = expected[f"pre_bgr{i}"], expected[f"pre_label{i}"][0]
    height, width = label.shape
    images[i, :height, :width] = bgr[::-1].transpose(1, 2, 0)
    labels[i, :height, :width] = np.where(label == 255, IGNORED, label)
    sizes.append((height, width))
  batch = {
    "image": jnp.asarray(images),
    "label": jnp.asarray(labels),
    "size": jnp.array(sizes, jnp.int32),
  }
  found = recipe().create_task().prepare(batch, jax.random.key(0))
  wanted = expected["pre_out"].transpose(0, 2, 3, 1)
  # Both are float32, and add and divide once.
  np.testing.assert_allclose(found.images, wanted, rtol=1e-6, atol=1e-6)
  stored = np.where(found.labels == IGNORED, 255, found.labels)
  np.testing.assert_array_equal(stored, expected["pre_labels"][:, 0])
