"""The experiment that a checkpoint stores, and whether a run may resume it."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.spatial_mamba import SPATIAL_MAMBA
from spatial_mamba_jax.training import provenance
from spatial_mamba_jax.training.config import (
  TrainConfig,
  TrainingError,
  parse_interval,
)

# Fields that a resumed run may change: they affect neither the parameters nor
# the training data.
_FREE_TO_CHANGE = (
  "model.name",  # Its dims and depths are compared instead.
  "data.data_dir",
  "data.num_workers",
  "data.num_threads",
  "data.prefetch",
  "data.max_unreadable_share",
  "data.test_crop_ratio",
  "task.test_flip",
  "task.test_ratios",
  "task.test_stride",
  "task.test_window",
  "mesh.replica",
  "mesh.fsdp",
  "evaluation_batch_size",
  "evaluate_every",
  "checkpoint_every",
  "local_checkpoint_dir",
  "log_every",
  "keep_last",
  "classes",
  "commit",
)

# Values of fields in checkpoints from before the fields existed.
_ADDED = {
  "model.family": SPATIAL_MAMBA.name,
  "optimizer.schedule": "cosine",
  "optimizer.undecayed": "vectors",
  "data.ignored_label": 255,
}


def check_same_experiment(
  saved: dict[str, Any], now: dict[str, Any], where: str
) -> None:
  """Refuses to resume a checkpoint with a config that contradicts it.

  Args:
    saved: the experiment of the checkpoint, as nested dictionaries.
    now: the experiment of the run, likewise.
    where: the working directory, for the message.

  Raises:
    TrainingError: the experiments differ; the message names the fields.
  """
  old = {**_ADDED, **_of_version_1(_flatten(saved))}
  new = _flatten(now)
  differing = differences(_binding(old), _binding(new))
  if differing:
    raise TrainingError(
      f"{where} holds another experiment: {'; '.join(differing)}; choose"
      " another workdir, or the old values"
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Returns a text for each field that differs, "seed was 0 and is 1"."""
  return [
    f"{field} was {old.get(field)!r} and is {new.get(field)!r}"
    for field in sorted(old.keys() | new.keys())
    if old.get(field) != new.get(field)
  ]


def saved_shards(experiment: dict[str, Any]) -> int:
  """Returns the size of `fsdp` in the mesh that saved a checkpoint."""
  return experiment.get("mesh", {}).get("fsdp", 1)


def to_dict(config: TrainConfig) -> dict[str, Any]:
  """Returns a config as JSON types, with the preset's values filled in."""
  fields = dataclasses.asdict(config)
  fields["task"]["kind"] = config.task.kind
  fields["model"]["mixer"]["name"] = config.model.mixer.name
  architecture = config.model.build()
  fields["model"]["family"] = architecture.family.name
  for name in ("dims", "depths", "in_channels", "mlp_ratio"):
    fields["model"][name] = getattr(architecture, name)
  return json.loads(json.dumps(fields))


def program_fields(config: TrainConfig) -> dict[str, Any]:
  """Returns {path: value} of the fields that the train step depends on."""
  fields = _binding(_flatten(to_dict(config)))
  del fields["init_from"]
  return fields


def describe(
  config: TrainConfig,
  training_examples: int,
  sums: Sequence[str],
  classes: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns the experiment that a checkpoint stores.

  Args:
    config: the config of the run.
    training_examples: the number of records in the training split.
    sums: the task's `sums`.
    classes: names of the classes, by label, if there are any.
  """
  return {
    **to_dict(config),
    "training_images": training_examples,
    "sums": sorted(sums),
    "classes": list(classes),
    "commit": provenance.commit(),
  }


def _binding(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that a resumed run may not change."""
  flat = _with_normalized_intervals(flat)
  # The name in earlier checkpoints.
  if flat.get("model.mixer.name") == "structure_aware":
    flat["model.mixer.name"] = "spatial_mamba"
  return {name: x for name, x in flat.items() if name not in _FREE_TO_CHANGE}


# Intervals, of which each has several spellings.
_INTERVALS = ("length", "optimizer.warmup")


def _with_normalized_intervals(flat: dict[str, Any]) -> dict[str, Any]:
  """Replaces "1 epoch", "1epoch" and the like by "1 epochs"."""
  intervals = {}
  for name in _INTERVALS:
    # A malformed interval stays unchanged, and then differs.
    with suppress(TrainingError):
      intervals[name] = str(parse_interval(str(flat.get(name)), name))
  return flat | intervals


# Fields of version 1: {old name: (new name, format of the value)}.
RENAMED = {
  "epochs": ("length", "{} epochs"),
  "optimizer.warmup_epochs": ("optimizer.warmup", "{} epochs"),
  "erasing_probability": ("task.erasing_probability", None),
  "label_smoothing": ("task.label_smoothing", None),
  "mixing.probability": ("task.mixing.probability", None),
  "mixing.cutmix_probability": ("task.mixing.cutmix_probability", None),
  "mixing.mixup_alpha": ("task.mixing.mixup_alpha", None),
  "mixing.cutmix_alpha": ("task.mixing.cutmix_alpha", None),
  "model.num_classes": ("task.num_classes", None),
  "model.d_state": ("model.mixer.d_state", None),
}


def _of_version_1(flat: dict[str, Any]) -> dict[str, Any]:
  """Converts an experiment of version 1, which had no tasks and mixers."""
  if "task.kind" in flat or not {"epochs", "model.name"} <= flat.keys():
    return flat
  new = {}
  for name, value in flat.items():
    name, pattern = RENAMED.get(name, (name, None))
    new[name] = value if pattern is None else pattern.format(value)
  architecture = get_model_config(new["model.name"])
  implementation = new.pop("model.implementation", "") or None
  has_no_kernels = implementation in ("sequential", "associative")
  return new | {
    "sums": ["correct"],
    "task.kind": "classification",
    "model.dims": list(architecture.dims),
    "model.depths": list(architecture.depths),
    "model.in_channels": 3,
    "model.mlp_ratio": 4.0,
    "model.layer_implementation": "xla" if has_no_kernels else None,
    "model.mixer.name": "spatial_mamba",
    "model.mixer.expand": 2,
    "model.mixer.implementation": implementation,
  }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat
