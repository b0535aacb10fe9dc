"""Spatial-Mamba micro with another token mixer, on scikit-learn's digits.

All mixers are trained alike, for 40 epochs as in configs/digits.py; their
parameters and FLOPs differ. `python -m benchmarks.mixers` compares them;
docs/mixers.md lists them.

    python train.py --config=configs/digits_mixers.py:ss2d \
      --workdir=runs/ss2d --config.model.mixer.d_state=16

The name after the colon is one of `spatial_mamba_jax.models.mixers.MIXERS`.
"""

import dataclasses

import configs.digits
from spatial_mamba_jax.fields import show, suggestion
from spatial_mamba_jax.models.mixers import MIXERS
from spatial_mamba_jax.training.config import TrainConfig, TrainingError


def get_config(name: str = "spatial_mamba") -> TrainConfig:
  """Returns the experiment of a mixer.

  Raises:
    TrainingError: no mixer has this name.
  """
  if name not in MIXERS:
    raise TrainingError(
      f"no mixer is called {show(name)}{suggestion(name, list(MIXERS))}: write"
      f" one of {', '.join(MIXERS)} after the colon"
    )
  config = configs.digits.get_config()
  config.model.mixer = dataclasses.replace(MIXERS[name])
  return config
