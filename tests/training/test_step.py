"""Training steps in double precision: sharding, accumulation, averages."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models import ModelConfig, SpatialMamba
from spatial_mamba_jax.models.pure import PureModel, Weights
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.tasks.classification.losses import (
  smoothed_targets,
  soft_cross_entropy,
)
from spatial_mamba_jax.tasks.classification.task import Prepared
from spatial_mamba_jax.training.config import OptimizerConfig
from spatial_mamba_jax.training.optimizer import (
  authors_schedule,
  make_optimizer,
)
from spatial_mamba_jax.training.state import initial_state
from spatial_mamba_jax.training.step import _moving_average, make_train_step

pytestmark = pytest.mark.usefixtures("strict")

ROOT = pathlib.Path(__file__).parents[2]


def task_of(architecture):
  """Classification of prepared batches."""
  task = ClassificationConfig(num_classes=3).create(
    architecture, DataConfig(), mesa_weight=0.0
  )
  task.prepare = lambda batch, key: Prepared(batch["image"], batch["target"])
  return task


@pytest.fixture(scope="module")
def small():
  """A task, its model in double precision, the optimizer and a state."""
  with jax.enable_x64(True):
    task = task_of(ModelConfig(dims=(8, 8), depths=(1, 1), dtype="float64"))
    model = PureModel(task.network)
    optimizer = make_optimizer(OptimizerConfig(), lambda step: 1e-2, model)
    weights = model.init(jax.random.key(0))
    yield task, model, optimizer, initial_state(weights, optimizer, task.sums)


def batch_of(size, copies=1):
  rng = np.random.default_rng(0)
  images = rng.standard_normal((size, 12, 12, 3))
  target = rng.dirichlet(np.ones(3), size)
  return {
    "image": jnp.asarray(np.repeat(images, copies, 0)),
    "target": jnp.asarray(np.repeat(target, copies, 0)),
  }


def step_of(small, **overrides):
  task, model, optimizer, state = small
  step = make_train_step(
    task, model, optimizer, seed=0, ema_decay=0.9, **overrides
  )
  return jax.jit(step), state


def evaluate(model, weights, images):
  return model.apply(weights, lambda network: network(images), train=False)[0]


def assert_same_weights(actual, expected, tolerance):
  for name, array in expected.items():
    np.testing.assert_allclose(
      actual[name], array, rtol=tolerance, atol=tolerance, err_msg=name
    )


@pytest.mark.usefixtures("x64")
def test_stacked_blocks_equal_the_model():
  config = ModelConfig(
    dims=(4, 6), depths=(2, 3), num_classes=3, dtype="float64"
  )
  pure = PureModel(partial(smj.SpatialMamba, config))
  model = SpatialMamba(config, rngs=nnx.Rngs(0))
  # Different weights for each block, as after some training.
  rng = np.random.default_rng(0)
  state = nnx.state(model, nnx.Param)
  nnx.update(
    model,
    jax.tree.map(lambda x: x + rng.standard_normal(x.shape) / 9, state),
  )
  weights = pure.weights_of(model)
  assert jax.tree.map(jnp.shape, weights) == jax.tree.map(
    jnp.shape, pure.shapes
  )
  bound = nnx.state(pure.bind(weights))
  assert jax.tree.all(jax.tree.map(jnp.array_equal, nnx.state(model), bound))

  images = batch_of(2)["image"]
  expected = nnx.jit(lambda model: model(images))(model)
  logits = jax.jit(partial(evaluate, pure))(weights, images)
  np.testing.assert_allclose(logits, expected, rtol=1e-10)
  model.train()
  expected = nnx.jit(lambda model: model(images))(model)
  logits, stats = jax.jit(
    lambda weights, images, key: pure.apply(
      weights,
      lambda network: network(images, rngs=nnx.Rngs(drop_path=key)),
      train=True,
    )
  )(weights, images, jax.random.key(0))
  np.testing.assert_allclose(logits, expected, rtol=1e-10)
  for name, x in pure.weights_of(model).stats.items():
    np.testing.assert_allclose(stats[name], x, rtol=1e-10, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_accumulation_of_equal_parts_equals_the_whole_batch(small):
  """Each part holds the same images, and so the same BatchNorm statistics."""
  batch = batch_of(4, copies=2)  # Parts interleave: [0, 2, 4, 6], [1, 3, 5, 7].
  plain, state = step_of(small)
  parts, _ = step_of(small, accumulation_steps=2)
  one, two = plain(state, batch), parts(state, batch)
  # Adam divides by the root of squared gradients: rounding of zero gradients
  # (a bias before a BatchNorm) would decide, so gradients are compared.
  for moment in ("mu", "nu"):
    old = optax_moment(one, moment)
    new = optax_moment(two, moment)
    np.testing.assert_allclose(new, old, atol=1e-9, err_msg=moment)
  for name in ("loss", "correct", "grad_norm", "images", "steps"):
    np.testing.assert_allclose(two.window[name], one.window[name], rtol=1e-9)
  counts = [x for k, x in two.weights.stats.items() if k.endswith("batches")]
  assert all(count == 2 for count in counts)


def optax_moment(state, name):
  (moments,) = [
    getattr(x, name)
    for x in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: hasattr(x, "mu")
    )
    if hasattr(x, "mu")
  ]
  return moments


@pytest.mark.usefixtures("x64")
def test_the_moving_average_covers_parameters_and_statistics(small):
  step, state = step_of(small)
  after = step(state, batch_of(4))
  for old, new, average in zip(
    *(jax.tree.leaves(x) for x in (state.ema, after.weights, after.ema)),
    strict=True,
  ):
    if old.dtype == jnp.int32:
      assert average == new == 1
    else:
      np.testing.assert_allclose(average, 0.9 * old + 0.1 * new, rtol=1e-12)
  changed = [
    name
    for name, x in after.weights.stats.items()
    if not np.array_equal(x, state.weights.stats[name])
  ]
  assert len(changed) == len(state.weights.stats)


def test_without_a_moving_average_it_is_the_weights():
  """Exactly: a sum of differences would be 0 here."""
  old, new = (Weights({"x": jnp.float32(x)}, {}) for x in (1e9, 1.0))
  assert _moving_average(old, new, 0.0).params["x"] == 1


@pytest.mark.usefixtures("x64")
def test_a_bad_step_is_remembered(small):
  step, state = step_of(small)
  batch = batch_of(4)
  state = step(state, batch)
  assert state.bad_step == -1
  state = step(state, {**batch, "image": batch["image"] * jnp.nan})
  state = step(state, batch)
  assert state.bad_step == 2


def test_losses():
  target = smoothed_targets(jnp.asarray([1]), 4, 0.2)
  np.testing.assert_allclose(target, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-6)
  logits = jnp.asarray([[1.0, 2.0, 0.5, -1.0]])
  shares = np.exp(logits) / np.exp(logits).sum()
  expected = -(target * np.log(shares)).sum()
  assert soft_cross_entropy(logits, target)[0] == pytest.approx(
    float(expected), rel=1e-6
  )


def test_schedule_by_hand():
  schedule = authors_schedule(
    peak=1.0, first=0.2, last=0.1, warmup_steps=2, steps=6
  )
  cosine = [0.1 + 0.45 * (1 + np.cos(np.pi * t / 4)) for t in range(3)]
  np.testing.assert_allclose(
    [schedule(step) for step in range(6)], [0.2, 0.2, 0.6, *cosine], rtol=1e-6
  )


@pytest.mark.usefixtures("x64")
def test_which_parameters_decay(small):
  """Without gradients, AdamW only decays."""
  _, _, optimizer, state = small
  params = state.weights.params
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, *_ = optimizer.update(zeros, optimizer.init(params), params)
  decayed = {name for name, x in updates.items() if jnp.any(x != 0)}
  could = {name for name, x in params.items() if jnp.any(x != 0)}
  # A_log is log(1) = 0, which decay does not change.
  matrices = {name for name in could if name.endswith(("kernel", "kernels"))}
  assert decayed == matrices
  np.testing.assert_allclose(
    updates["head.kernel"], -1e-2 * 0.05 * params["head.kernel"], rtol=1e-12
  )


@pytest.mark.usefixtures("x64")
def test_learning_rates_fall_from_layer_to_layer():
  architecture = ModelConfig(dims=(4, 4), depths=(1, 2), num_classes=3)
  model = PureModel(partial(smj.SpatialMamba, architecture))

  def updates(decay):
    optimizer = make_optimizer(
      OptimizerConfig(layer_decay=decay, weight_decay=0.0),
      lambda step: 1.0,
      model,
    )
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), model.shapes.params)
    return optimizer.update(ones, optimizer.init(ones), ones)[0]

  plain, layered = updates(1.0), updates(0.5)
  # Four layers before the head: the stem, a block, and two more.
  expected = {
    "stem": 1 / 16,
    "stages.0": 1 / 8,
    "downsamples.0": 1 / 4,  # The layer of the block after it.
    "stages.1": np.array([1 / 4, 1 / 2]),
    "norm": 1,
    "head": 1,
  }
  found = set()
  for name, x in layered.items():
    (layer,) = (layer for layer in expected if name.startswith(layer + "."))
    share = np.asarray(expected[layer])
    share = share.reshape(share.shape + (1,) * (x.ndim - share.ndim))
    np.testing.assert_allclose(x, share * np.asarray(plain[name]), rtol=1e-12)
    found.add(layer)
  assert found == set(expected)


@pytest.mark.usefixtures("x64")
def test_a_linear_probe_leaves_the_backbone_untouched():
  task = task_of(
    ModelConfig(dims=(8, 8), depths=(1, 1), drop_path_rate=0.5, dtype="float64")
  )
  model = PureModel(task.network, linear_probe=True)
  optimizer = make_optimizer(OptimizerConfig(), lambda step: 1e-2, model)
  weights = model.init(jax.random.key(0))
  state = before = initial_state(weights, optimizer, task.sums)
  step, _ = step_of((task, model, optimizer, state))
  batch = batch_of(4)
  for _ in range(3):
    state = step(state, batch)
  head = {"head.kernel", "head.bias"}
  for old, new in ((before.weights, state.weights), (before.ema, state.ema)):
    changed = {
      name
      for name, x in {**new.params, **new.stats}.items()
      if not np.array_equal(x, {**old.params, **old.stats}[name])
    }
    assert changed == head
  # The loss is that of eval mode, without drop path and batch statistics.
  logits = jax.jit(partial(evaluate, model))(before.weights, batch["image"])
  expected = jnp.mean(soft_cross_entropy(logits, batch["target"]))
  one = step(before, batch)
  np.testing.assert_allclose(one.window["loss"], expected, rtol=1e-12)
  moments = optax_moment(state, "mu")
  assert moments.size == sum(weights.params[name].size for name in head)
