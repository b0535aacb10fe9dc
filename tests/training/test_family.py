"""Tests a second family of networks, from its config to its training."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.layers import linear
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
  TrainingError,
)
from spatial_mamba_jax.training.loop import train
from spatial_mamba_jax.training.weights import read_weights
from tests.models.test_stage import RollConfig


class Patches(nnx.Module):
  """Projects means over 4 x 4 pixels."""

  def __init__(self, dim, *, config, rngs):
    dtype = config.dtype
    self.project = linear(config.in_channels, dim, dtype=dtype, rngs=rngs)

  def __call__(self, x):
    return self.project(nnx.avg_pool(x, (4, 4), (4, 4)))


class MixerBlock(nnx.Module):
  """A block of a mixer without an MLP."""

  def __init__(self, dim, variant, *, config, rngs):
    self.mixer = config.mixer.create(dim, variant, config=config, rngs=rngs)

  def __call__(self, x, scales=None):
    return x + self.mixer(x, None if scales is None else scales[0])


class Halving(nnx.Module):
  """Projects means over 2 x 2 tokens."""

  def __init__(self, dim, dim_out, *, config, rngs):
    self.project = linear(dim, dim_out, dtype=config.dtype, rngs=rngs)

  def __call__(self, x):
    return self.project(nnx.avg_pool(x, (2, 2), (2, 2)))


class Roller(smj.Classifier):
  pass


ROLLER = smj.Family(
  "roller", Patches, MixerBlock, Halving, Roller, smj.Backbone
)
SMALL = {
  "family": ROLLER,
  "mixer": RollConfig(),
  "dims": (4, 6),
  "depths": (1, 2),
}
NAME = "spatial_mamba_micro"


def test_networks_are_of_the_family_that_their_config_has():
  rngs, images = nnx.Rngs(0), jnp.ones((2, 16, 24, 3))
  model = smj.create_model(NAME, num_classes=3, rngs=rngs, **SMALL)
  assert type(model) is Roller
  assert type(model.stages[1].blocks[0]) is MixerBlock
  assert model(images).shape == (2, 3)
  backbone = smj.create_backbone(NAME, out_indices=(1,), rngs=rngs, **SMALL)
  assert type(backbone.stem) is Patches
  (features,) = backbone(images)
  assert features.shape == (2, 2, 3, 6)

  config = ModelSection(**SMALL).build()
  assert config.family is ROLLER
  assert type(smj.create_model(NAME, rngs=rngs)) is smj.SpatialMamba
  section = ModelSection()
  section.family = "roller"
  with pytest.raises(TrainingError, match="family must be a Family or None"):
    section.validate()
  with pytest.raises(
    ValueError, match="a Roller is not a Spatial-Mamba or VMamba"
  ):
    smj.save_pretrained(model, "unused")


def test_a_family_is_trained_and_resumed_as_itself(tmp_path, capfd):
  config = TrainConfig(
    task=ClassificationConfig(num_classes=3),
    model=ModelSection(**SMALL),
    data=DataConfig(
      name="synthetic", image_size=16, synthetic_images=8, synthetic_classes=3
    ),
    optimizer=OptimizerConfig(reference_batch_size=4, warmup="0 steps"),
    batch_size=4,
    length="2 steps",
    evaluation_batch_size=8,
    ema_decay=0.0,
  )
  first, second = tmp_path / "first", tmp_path / "second"
  assert train(config, first).values["images"] == 8
  config.model.family = None
  with pytest.raises(
    TrainingError, match="family was 'roller' and is 'spatial"
  ):
    train(config, first)
  config.model.family = ROLLER
  config.init_from, config.linear_probe = str(first), True
  train(config, second)
  assert "including its head" in capfd.readouterr().err
  before, after = map(read_weights, (first, second))
  changed = {
    name
    for name, x in before.state_dict.items()
    if not np.array_equal(after.state_dict[name], x)
  }
  assert changed == {"head.weight", "head.bias"}
