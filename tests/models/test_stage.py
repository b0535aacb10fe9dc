"""Stages of unlike blocks, and of blocks with statistics."""

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.models.layers import linear
from spatial_mamba_jax.models.mixers import MixerConfig
from spatial_mamba_jax.models.norms import BatchNorm
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.models.stage import Stage

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.usefixtures("strict")]


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RollConfig(MixerConfig):
  """Mixes each token with its neighbour in the row or the column, by turns."""

  name: ClassVar[str] = "roll"

  alternates: bool = True

  def variant(self, place):
    return place.index % 2 if self.alternates else 0

  def create(self, dim, variant, *, config, rngs):
    return Roll(dim, axis=1 + variant, dtype=config.dtype, rngs=rngs)


class Roll(nnx.Module):
  """A mixer with a BatchNorm."""

  def __init__(self, dim, *, axis, dtype, rngs):
    self.norm = BatchNorm(dim, dtype=dtype, rngs=rngs)
    self.project = linear(dim, dim, dtype=dtype, rngs=rngs)
    self.axis = axis

  def __call__(self, x, branch_scale=None):
    y = self.project(self.mix(*self.select(x)))
    return y if branch_scale is None else y * branch_scale[:, None, None, None]

  def select(self, x):
    return self.norm(x), None

  def mix(self, values, operands):
    return values + jnp.roll(values, 1, self.axis)


def create(depths=(1, 4), *, rngs, remat=None, **mixer):
  config = smj.ModelConfig(
    dims=(4, 6),
    depths=depths,
    num_classes=3,
    mixer=RollConfig(**mixer),
    drop_path_rate=0.4,
    dtype="float64",
    remat=remat,
  )
  return smj.SpatialMamba(config, rngs=rngs)


IMAGES = np.random.default_rng(0).normal(size=(3, 32, 16, 3))
KEY = jax.random.key(5)


def call(model):
  rngs = None if model.deterministic else nnx.Rngs(drop_path=KEY)
  return model(IMAGES, rngs=rngs)


def one_by_one(model):
  """Returns the logits of blocks that are called one by one."""
  x = model.stem(jnp.asarray(IMAGES))
  scales = model._drop_path_scales(nnx.Rngs(drop_path=KEY), 3)
  for i, stage in enumerate(model.stages):
    x = x if i == 0 else model.downsamples[i - 1](x)
    for j, block in enumerate(stage.blocks):
      x = block(x, None if scales[i] is None else scales[i][j])
  return model.head(jnp.mean(model.norm(x), axis=(1, 2)))


def statistics(model):
  return {
    ".".join(map(str, path)): np.asarray(variable[...])
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
  }


def assert_equal_arrays(actual, expected):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(actual[name], x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
  ("remat", "alternates"), [(True, True), (False, True), (True, False)]
)
def test_blocks_are_those_called_one_by_one(alternates, remat):
  """Holds for unlike blocks; and statistics move in training."""
  model = create(rngs=nnx.Rngs(0), alternates=alternates, remat=remat)
  plain = nnx.clone(model)
  np.testing.assert_allclose(call(model), one_by_one(plain), rtol=1e-10)
  assert_equal_arrays(statistics(model), statistics(plain))
  before = statistics(model)
  model.train()
  plain.train()
  np.testing.assert_allclose(call(model), one_by_one(plain), rtol=1e-10)
  after = statistics(model)
  assert_equal_arrays(after, statistics(plain))
  moved = [name for name, x in before.items() if (x != after[name]).any()]
  assert len([x for x in moved if "blocks.3.mixer.norm" in x]) == 3


@pytest.mark.parametrize("alternates", [True, False])
def test_a_pure_model_equals_the_model(alternates):
  """Alike blocks are stacked, unlike ones are not; both are trained."""
  pure = PureModel(partial(create, alternates=alternates))
  weights = pure.init(jax.random.key(0))
  stacked = "stages.1.blocks.mixer.project.kernel"
  assert (stacked in weights.params) != alternates
  model = create(rngs=nnx.Rngs(jax.random.key(0)), alternates=alternates)
  assert_equal_arrays(smj_arrays(pure.bind(weights)), smj_arrays(model))
  logits, _ = pure.apply(weights, call, train=False)
  np.testing.assert_allclose(logits, call(model), rtol=1e-10)
  logits, stats = jax.jit(lambda w: pure.apply(w, call, train=True))(weights)
  model.train()
  np.testing.assert_allclose(logits, call(model), rtol=1e-10)
  bound = pure.bind(weights.replace(stats=stats))
  assert_equal_arrays(statistics(bound), statistics(model))


def smj_arrays(model):
  return {
    ".".join(map(str, path)): np.asarray(variable[...])
    for path, variable in nnx.to_flat_state(nnx.state(model))
  }


def test_a_block_of_another_shape_is_trained_too():
  model = create(rngs=nnx.Rngs(0), alternates=False)
  block = model.stages[1].blocks[2]
  block.mixer.project = nnx.Linear(
    6, 6, use_bias=False, param_dtype="float64", rngs=nnx.Rngs(1)
  )
  plain = nnx.clone(model)
  model.train()
  plain.train()
  np.testing.assert_allclose(call(model), one_by_one(plain), rtol=1e-10)
  assert_equal_arrays(statistics(model), statistics(plain))


class WithDropout(nnx.Module):
  """A block with a random stream."""

  def __init__(self, rngs):
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x, scales=None):
    return self.dropout(x)


def test_a_random_stream_within_a_block_is_refused():
  with pytest.raises(ValueError, match=r"^blocks\.0\.dropout\.rngs.*network's"):
    Stage(
      lambda _, rngs: WithDropout(rngs), (0, 0), remat=None, rngs=nnx.Rngs(0)
    )


def test_a_mixer_without_states():
  model = create(rngs=nnx.Rngs(0))
  model.eval()
  images = jnp.zeros((1, 8, 8, 3))
  with pytest.raises(ValueError, match=r"structure-aware mixer.*with a Roll$"):
    smj.block_states(model, images, 0, 0)


class Nested(nnx.Module):
  """A network with a head, and a backbone under another name."""

  def __init__(self, *, rngs):
    config = smj.ModelConfig(dims=(4, 6), depths=(1, 2), dtype="float64")
    self.encoder = smj.SpatialMambaBackbone(config, out_indices=(1,), rngs=rngs)
    self.stem = nnx.Linear(6, 2, param_dtype="float64", rngs=rngs)


def test_a_backbone_is_found_under_any_name():
  """Layer-wise learning rates and linear probes need it."""
  model = PureModel(Nested)
  layers = {name: np.max(x) for name, x in model.layers.items()}
  assert layers["encoder.stem.conv1.conv.kernel"] == 0
  assert layers["encoder.stages.0.blocks.conv1.kernel"] == 1
  assert layers["encoder.downsamples.0.expand.kernel"] == 2
  assert model.layers["encoder.stages.1.blocks.conv1.kernel"].tolist() == [2, 3]
  assert layers["encoder.norms.1.scale"] == layers["stem.kernel"] == 4
  probe = PureModel(Nested, linear_probe=True)
  assert probe.decays == {"stem.kernel": True, "stem.bias": False}
