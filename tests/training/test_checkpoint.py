"""Which checkpoints are kept."""

import jax.numpy as jnp
import optax

from spatial_mamba_jax.training.checkpoint import Checkpoints, open_checkpoint
from spatial_mamba_jax.training.evaluation import Evaluation
from spatial_mamba_jax.training.state import Weights, initial_state


def state_after(step):
  weights = Weights(params={"w": jnp.full(3, float(step))}, stats={})
  state = initial_state(weights, optax.sgd(1.0))
  ema = Weights(params={"w": jnp.full(3, step + 0.5)}, stats={})
  return state.replace(step=jnp.asarray(step), ema=ema)


def test_the_best_outlives_a_restart(tmp_path):
  for steps in ({1: 0.5, 2: 0.9, 3: 0.7}, {4: 0.8, 5: 0.6, 6: None}):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
      for step, top1 in steps.items():
        evaluation = None
        if top1 is not None:
          evaluation = Evaluation(
            top1, 1.0, loss=1.0, ece=0.1, images=9, undecided=0, unreadable=0
          )
        checkpoints.save(state_after(step), {}, evaluation)
  with Checkpoints(tmp_path, create=False) as checkpoints:
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best_step() == 2
    assert checkpoints.latest_step() == 6
  like = state_after(0).ema
  for path, step in ((tmp_path, 2), (tmp_path / "5", 5)):
    with open_checkpoint(path) as (checkpoints, found):
      assert found == step
      weights = checkpoints.restore_weights(step, like)
    assert weights.keys() == {"ema", "raw"}
    assert weights["raw"].params["w"][0] == step
    assert weights["ema"].params["w"][0] == step + 0.5
