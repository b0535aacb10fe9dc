"""UPerNet computes what mmsegmentation computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.architecture import (
  Heads,
  abstract_segmentor,
)
from spatial_mamba_jax.convert.names import torch_tensors, variables
from spatial_mamba_jax.convert.tables import UPERNET, PartTables
from spatial_mamba_jax.data.label_maps import IGNORED
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.heads.resampling import pool, resize
from spatial_mamba_jax.models.heads.upernet import FCNHead, UPerHead
from spatial_mamba_jax.models.norms import BatchNorm
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.segmentor import HEADS
from spatial_mamba_jax.tasks.segmentation import losses

TABLE = PartTables(dict.fromkeys(HEADS, UPERNET))


class GoldenHeads(nnx.Module):
  """The heads of the golden vectors."""

  def __init__(self, *, rngs):
    options = {"dropout_rate": 0.0, "dtype": "float64", "rngs": rngs}
    self.decode_head = UPerHead((16, 32, 64, 128), 32, 11, **options)
    self.auxiliary_head = FCNHead(64, 24, 11, **options)

  def __call__(self, features):
    return self.decode_head(features), self.auxiliary_head(features[2])


def golden_heads(weights):
  heads = nnx.eval_shape(lambda: GoldenHeads(rngs=nnx.Rngs(0)))
  used = set()
  for path, variable in variables(heads):
    names = TABLE.tensors(path)
    layout = TABLE.layout(path, variable.ndim)
    array = layout.from_torch([weights[name] for name in names])
    assert array.shape == variable.shape, path
    variable.set_value(jnp.asarray(array, variable.dtype))
    used.update(names)
  assert used == weights.keys()
  return heads


def nhwc(array):
  return jnp.asarray(array.transpose(0, 2, 3, 1))


def assert_close(found, expected, name=""):
  """Compares [B, H, W, C] with PyTorch's [B, C, H, W], or equal shapes."""
  found = np.asarray(found)
  if found.ndim == 4:
    found = found.transpose(0, 3, 1, 2)
  scale = np.abs(expected).max()
  assert np.abs(found - expected).max() <= 1e-9 * scale, name


def test_eval_mode_is_the_authors(golden, x64):
  heads = golden_heads(golden("segmentation/weights"))
  expected = golden("segmentation/eval")

  @nnx.jit
  def run(heads, features):
    decode = heads.decode_head
    return {
      "logits": decode(features),
      "aux_logits": heads.auxiliary_head(features[2]),
      "psp": decode.pyramid_pooling(features[3]),
      "feature": decode.pyramid(features),
    }

  features = [nhwc(expected[f"x{i}"]) for i in range(4)]
  heads.eval()
  for name, value in run(heads, features).items():
    assert_close(value, expected[name], name)


def test_training_is_the_authors(golden, x64):
  """Losses, accuracies, every gradient, and the running statistics."""
  heads = golden_heads(golden("segmentation/weights"))
  expected = golden("segmentation/train")
  label = expected["label"][:, 0].astype(np.int16)
  labels = jnp.asarray(np.where(label == 255, IGNORED, label))
  heads.train()
  graphdef, params, stats = nnx.split(heads, nnx.Param, nnx.BatchStat)

  def run(params, features, stats):
    # Rebuilt, because what `jax.grad` traces must not change variables from
    # outside of it.
    stats = jax.tree.map(jnp.asarray, stats)
    heads = nnx.merge(graphdef, params, stats)
    logits = heads(features)
    decode, auxiliary = (losses.pixel_loss(x, labels) for x in logits)
    total = decode.value + 0.4 * auxiliary.value
    new = nnx.state(heads, nnx.BatchStat)
    return total, (logits, decode, auxiliary, new)

  run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
  features = [nhwc(golden("segmentation/eval")[f"x{i}"]) for i in range(4)]
  (total, rest), (of_params, of_features) = run(params, features, stats)
  logits, decode, auxiliary, new = rest
  assert_close(total, expected["total"])
  assert_close(decode.value, expected["decode.loss_ce"])
  assert_close(0.4 * auxiliary.value, expected["aux.loss_ce"])
  # These were computed in float32.
  np.testing.assert_allclose(
    100 * decode.accuracy, expected["decode.acc_seg"][0], rtol=1e-6
  )
  np.testing.assert_allclose(
    100 * auxiliary.accuracy, expected["aux.acc_seg"][0], rtol=1e-6
  )
  assert_close(logits[0], expected["train_logits"])
  assert_close(logits[1], expected["train_aux_logits"])
  for i, gradient in enumerate(of_features):
    assert_close(gradient, expected[f"grad_x{i}"], f"x{i}")
  after = {
    ".".join(map(str, path)): variable[...]
    for path, variable in nnx.to_flat_state(new)
  }
  after = torch_tensors(after, TABLE)
  statistics = {
    name.removeprefix("after/"): x
    for name, x in expected.items()
    if name.startswith("after/")
  }
  counts = {name for name in after if name.endswith("num_batches_tracked")}
  assert after.keys() - counts == statistics.keys()
  for name, value in statistics.items():
    assert_close(after[name], value, name)
  gradients = {
    ".".join(map(str, path)): variable[...]
    for path, variable in nnx.to_flat_state(of_params)
  }
  name = "decode_head.bottleneck.conv.weight"
  found = torch_tensors(gradients, TABLE)[name]
  expected = golden("segmentation/bottleneck_gradient")[name]
  scale = np.abs(expected).max()
  assert np.abs(found - expected).max() <= 1e-9 * scale
  _check_derivative(
    lambda params: run(params, features, stats)[0][0], params, of_params
  )


def _check_derivative(function, params, gradient):
  """Compares the gradient of all weights along a direction with differences."""
  leaves, structure = jax.tree.flatten(params)
  rng = np.random.default_rng(0)
  direction = jax.tree.unflatten(
    structure, [jnp.asarray(rng.normal(size=x.shape)) for x in leaves]
  )
  step = 1e-8  # Short, because ReLUs have kinks.
  moved = [
    function(
      jax.tree.map(lambda x, d, s=sign: x + s * step * d, params, direction)
    )
    for sign in (1, -1)
  ]
  slope = sum(
    jnp.sum(g * d)
    for g, d in zip(
      jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True
    )
  )
  difference = (moved[0] - moved[1]) / (2 * step)
  np.testing.assert_allclose(slope, difference, rtol=1e-4)


@pytest.mark.parametrize(
  ("size", "counts"),
  [
    ("tiny", (26_236_758, 29_678_742, 628_886)),
    pytest.param(
      "small", (42_562_176, 29_678_742, 628_886), marks=pytest.mark.soak
    ),
    ("base", (94_977_936, 31_497_366, 923_798)),
  ],
)
def test_parameter_counts_are_the_authors(size, counts):
  config = get_model_config(f"spatial_mamba_{size}", num_classes=150)
  model = abstract_segmentor(config, Heads(512, 256))
  parts = dict.fromkeys(("backbone", *HEADS), 0)
  for path, variable in variables(model):
    if isinstance(variable, nnx.Param):
      parts[path.partition(".")[0]] += variable.size
  assert tuple(parts.values()) == counts


def test_names_and_shapes_are_the_authors(golden):
  config = get_model_config("spatial_mamba_tiny", num_classes=150)
  model = abstract_segmentor(config, Heads(512, 256))
  for _, variable in variables(model):
    variable.set_value(np.broadcast_to(np.float32(0), variable.shape))
  found = {
    name: ",".join(map(str, tensor.shape))
    for name, tensor in smj.convert.to_torch(model).items()
  }
  names = golden("segmentation/tiny_names")
  assert found == dict(zip(names["name"], names["shape"], strict=True))


def segmentor(**overrides):
  return smj.create_segmentor(
    **{
      "name": "spatial_mamba_micro",
      "dims": (4, 6, 8),
      "depths": (1, 1, 1),
      "num_classes": 5,
      "head_channels": 8,
      "auxiliary_channels": 6,
      "rngs": nnx.Rngs(0),
      **overrides,
    }
  )


@pytest.mark.parametrize("name", ["spatial_mamba_micro", "vmamba_micro"])
def test_logits_have_the_size_of_the_image(name):
  def run(images):
    return segmentor(name=name)(images)

  found = jax.eval_shape(run, jnp.zeros((2, 37, 50, 3)))
  assert found.shape == (2, 37, 50, 5)
  assert found.dtype == jnp.float32


def test_training_needs_random_streams():
  def shape(drop_path_rate, **streams):
    def run():
      model = segmentor(drop_path_rate=drop_path_rate)
      model.train()
      rngs = nnx.Rngs(**streams) if streams else None
      return model(jnp.zeros((2, 32, 32, 3)), rngs=rngs)

    return jax.eval_shape(run).shape

  with pytest.raises(ValueError, match="drop_path"):
    shape(0.1)
  with pytest.raises(ValueError, match="dropout"):
    shape(0.0)
  assert shape(0.1, drop_path=0, dropout=0) == (2, 32, 32, 5)


def test_one_stage_is_refused():
  with pytest.raises(UserError, match="two stages or more"):
    segmentor(dims=(8,), depths=(1,))


@pytest.mark.parametrize("sizes", [((5, 7), (11, 3)), ((6, 6), (2, 2))])
def test_resizing_is_jax_image(x64, sizes):
  (height, width), new = sizes
  x = jax.random.normal(jax.random.key(0), (2, height, width, 3), "float64")
  expected = jax.image.resize(
    x, (2, *new, 3), "bilinear", antialias=False, precision="highest"
  )
  np.testing.assert_allclose(resize(x, *new), expected, atol=1e-12)


def test_pooling_averages_overlapping_bins(x64):
  x = jax.random.normal(jax.random.key(0), (1, 5, 2, 1), "float64")
  found = pool(x, 3)
  # Bins of five rows: 0..1, 1..3, 3..4; of two columns: 0, 0..1, 1.
  rows, columns = ((0, 2), (1, 4), (3, 5)), ((0, 1), (0, 2), (1, 2))
  for i, (top, bottom) in enumerate(rows):
    for j, (left, right) in enumerate(columns):
      expected = x[0, top:bottom, left:right, 0].mean()
      np.testing.assert_allclose(found[0, i, j, 0], expected, rtol=1e-12)


def test_statistics_of_groups():
  """Each group of images is normalised as a batch of its own."""
  x = jax.random.normal(jax.random.key(0), (6, 4, 5, 3)) + 2
  grouped = BatchNorm(3, dtype=jnp.float32, rngs=nnx.Rngs(0))
  grouped.train()
  grouped.group = 2
  found = grouped(x)
  alone = []
  for part in jnp.split(x, 3):
    norm = BatchNorm(3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.train()
    y = norm(part)
    alone.append((y, norm.mean[...], norm.var[...]))
  outputs, means, variances = zip(*alone, strict=True)
  np.testing.assert_allclose(found, jnp.concatenate(outputs), atol=1e-5)
  np.testing.assert_allclose(grouped.mean, np.mean(means, 0), atol=1e-6)
  np.testing.assert_allclose(grouped.var, np.mean(variances, 0), atol=1e-6)
  grouped.group = 4
  with pytest.raises(UserError, match="in groups of 4"):
    grouped(x)


def test_only_the_backbone_has_groups():
  model = nnx.eval_shape(
    lambda: smj.Segmentor(
      get_model_config("spatial_mamba_micro"),
      statistics_group=2,
      rngs=nnx.Rngs(0),
    )
  )
  groups = {
    (path[0], module.group)
    for path, module in nnx.iter_graph(model)
    if isinstance(module, BatchNorm)
  }
  expected = {("backbone", 2), ("decode_head", None), ("auxiliary_head", None)}
  assert groups == expected
