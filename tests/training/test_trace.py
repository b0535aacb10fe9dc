"""Twelve steps of the authors' recipe with MESA, against their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.tasks.classification.task import Prepared
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
)
from spatial_mamba_jax.training.optimizer import (
  authors_schedule,
  make_optimizer,
)
from spatial_mamba_jax.training.state import initial_state
from spatial_mamba_jax.training.step import make_train_step

pytestmark = pytest.mark.usefixtures("strict")


def golden_batch(named_weights, seed, step):
  """The trace's images, channels last, and its soft targets."""
  images = named_weights.named_images(8, 32, 32, 100 * seed + step)
  target = np.random.default_rng([seed, step]).random((8, 10)) ** 4
  target /= target.sum(-1, keepdims=True)
  return np.moveaxis(images, 1, 3).astype(np.float64), target


@pytest.mark.usefixtures("x64")
def test_twelve_steps_equal_the_authors(golden, named_weights):
  trace = golden("train_trace")
  seed, steps = int(trace["seed"]), len(trace["loss"])
  config = TrainConfig(
    task=ClassificationConfig(num_classes=10),
    model=ModelSection(name="spatial_mamba_micro", dtype="float64"),
    optimizer=OptimizerConfig(),
    ema_decay=float(trace["ema_decay"]),
    mesa_weight=float(trace["mesa"]),
    mesa_start=0.0,
  )
  schedule = authors_schedule(
    peak=float(trace["base_lr"]),
    first=float(trace["warmup_lr"]),
    last=float(trace["min_lr"]),
    warmup_steps=int(trace["warmup_steps"]),
    steps=steps,
  )
  np.testing.assert_allclose(
    [schedule(step) for step in range(steps)], trace["lr"], rtol=1e-12
  )
  task = config.create_task()
  task.prepare = lambda batch, key: Prepared(batch["image"], batch["target"])
  pure = PureModel(task.network)
  optimizer = make_optimizer(config.optimizer, schedule, pure)
  model = task.network(rngs=nnx.Rngs(0))
  smj.convert.from_torch(model, named_weights.named_state_dict("micro", seed))
  state = initial_state(pure.weights_of(model), optimizer, task.sums)
  train_step = jax.jit(
    make_train_step(
      task,
      pure,
      optimizer,
      seed=config.seed,
      ema_decay=config.ema_decay,
      mesa_from=config.count_steps(steps * config.batch_size).mesa_from,
    ),
    donate_argnums=0,
  )
  sums = {"loss": 0.0, "grad_norm": 0.0}
  losses, norms = [], []
  for step in range(steps):
    images, target = golden_batch(named_weights, seed, step)
    state = train_step(
      state, {"image": jnp.asarray(images), "target": jnp.asarray(target)}
    )
    window = {name: float(state.window[name]) for name in sums}
    losses.append(window["loss"] - sums["loss"])
    norms.append(window["grad_norm"] - sums["grad_norm"])
    sums = window
  np.testing.assert_allclose(losses, trace["loss"], rtol=1e-6)
  np.testing.assert_allclose(norms, trace["grad_norm"], rtol=1e-6)

  @jax.jit
  def evaluate(weights, images):
    return pure.apply(weights, lambda network: network(images), train=False)[0]

  images = np.moveaxis(named_weights.named_images(4, 32, 32, 99), 1, 3)
  for weights, name in (
    (state.weights, "final_logits"),
    (state.ema, "final_ema_logits"),
  ):
    logits = evaluate(weights, jnp.asarray(images, jnp.float64))
    scale = np.abs(trace[name]).max()
    np.testing.assert_allclose(logits, trace[name], atol=1e-6 * scale, rtol=0)
