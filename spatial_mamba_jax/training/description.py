"""The description of a run, `run.json`, for people and for the report."""

import json
import math
import pathlib
from typing import Any

import jax

from spatial_mamba_jax.tasks.base import Task
from spatial_mamba_jax.training import provenance
from spatial_mamba_jax.training.config import Schedule, TrainConfig
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.experiment import to_dict

# Packages whose versions are recorded.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def write_description(
  path: pathlib.Path, config: TrainConfig, times: Schedule, task: Task
) -> None:
  """Writes the config, task, versions and devices of a run.

  Raises:
    OSError: the file cannot be written.
  """
  description = {
    "config": to_dict(config),
    "epoch_steps": times.epoch,
    "steps": times.steps,
    "task": {
      "kind": config.task.kind,
      "score": task.score,
      "panels": [panel._asdict() for panel in task.panels],
      "columns": task.columns,
    },
    "versions": provenance.versions(_PACKAGES),
    "commit": provenance.commit(),
    "devices": [device.device_kind for device in jax.devices()],
  }
  text = json.dumps(_without_non_finite(description), indent=2, allow_nan=False)
  write_whole(path, text + "\n")


def _without_non_finite(tree: Any) -> Any:
  """Replaces NaN and infinity, which JSON does not have, by strings."""
  if isinstance(tree, dict):
    return {name: _without_non_finite(value) for name, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_without_non_finite(value) for value in tree]
  is_finite = not isinstance(tree, float) or math.isfinite(tree)
  return tree if is_finite else str(tree)
