"""What a run of `train.py` stores of its model, beside the weights."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from spatial_mamba_jax.convert.model_card import UNKNOWN, Provenance
from spatial_mamba_jax.models.mixers import MIXERS, MixerConfig
from spatial_mamba_jax.preprocessing import IMAGENET, Preprocessing

# The name of the mixer of Spatial-Mamba in earlier checkpoints.
_FORMER_NAME = "structure_aware"
# What a model card does not show: other things, and paths of a machine.
_LEFT_OUT = ("classes", "commit", "sums", "init_from", "local_checkpoint_dir")


class Trained(NamedTuple):
  """What is known of a model that a run trained.

  Attributes:
    mixer: the token mixer; None for one that `MIXERS` lacks.
    preprocessing: what evaluation did with images.
    class_names: names of the classes, by label; empty if unknown.
    provenance: for the model card.
  """

  mixer: MixerConfig | None = None
  preprocessing: Preprocessing = IMAGENET
  class_names: tuple[str, ...] = ()
  provenance: Provenance = UNKNOWN


def trained_model(
  experiment: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> Trained:
  """Reads the experiment of a checkpoint, of any version.

  Args:
    experiment: see `training.experiment.describe`.
    evaluation: the results of the checkpoint's evaluation, if there are any.
  """
  config = {
    key: value for key, value in experiment.items() if key not in _LEFT_OUT
  }
  if isinstance(config.get("data"), dict):
    config["data"] = {**config["data"], "data_dir": ""}
  return Trained(
    _mixer(experiment),
    _preprocessing(experiment),
    tuple(experiment.get("classes", ())),
    Provenance(
      experiment=config,
      commit=experiment.get("commit") or "",
      evaluation=evaluation,
    ),
  )


def _mixer(experiment: Mapping[str, Any]) -> MixerConfig | None:
  fields = dict(experiment.get("model", {}).get("mixer", {}))
  name = fields.pop("name", None)
  known = MIXERS.get("spatial_mamba" if name == _FORMER_NAME else name)
  if known is None:
    return None
  names = {field.name for field in dataclasses.fields(known)}
  kept = {key: x for key, x in fields.items() if key in names}
  # The best implementation depends on the device of the reader.
  kept.pop("implementation", None)
  return dataclasses.replace(known, **kept)


def _preprocessing(experiment: Mapping[str, Any]) -> Preprocessing:
  if experiment.get("task", {}).get("kind") != "classification":
    return IMAGENET
  with suppress(KeyError, TypeError, ValueError):  # Another version's.
    data = experiment["data"]
    size = data["image_size"]
    short = int(size / data["test_crop_ratio"])
    return Preprocessing(image_size=size, short_side=short)
  return IMAGENET
