"""Creates models by name, with fresh or with given weights."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from spatial_mamba_jax.convert.architecture import (
  Architecture,
  abstract_network,
  infer_architecture,
)
from spatial_mamba_jax.convert.families import named
from spatial_mamba_jax.convert.files import is_of_weights, read_file
from spatial_mamba_jax.convert.hub import directory_of
from spatial_mamba_jax.convert.names import from_torch, is_counter
from spatial_mamba_jax.convert.pretrained import read_directory
from spatial_mamba_jax.convert.pretrained_config import CONFIG
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.backbone import Backbone, Classifier
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.presets import get_model_config

Path = str | os.PathLike[str]


def create_model(
  name: str,
  *,
  pretrained: Path | None = None,
  revision: str | None = None,
  rngs: nnx.Rngs | None = None,
  **overrides: Any,
) -> Classifier:
  """Creates a classifier, in eval mode.

      model = create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
      model = create_model("spatial_mamba_tiny", pretrained="tiny.pth")
      logits = model(images)

  Args:
    name: one of `list_models()`.
    pretrained: weights of a classifier: a directory of `save_pretrained`, a
      repository of the Hugging Face hub ("org/name"), or a file that
      `convert.read_file` reads. None for the authors' initialisation.
    revision: branch, tag or commit of a repository.
    rngs: random streams; `params` initialises the weights. With `pretrained`
      they are needed only for a new head.
    **overrides: fields of `ModelConfig` to replace. With `pretrained`, the head
      is replaced by a new one if `num_classes` is given and differs.

  Returns:
    A classifier of the name's family, e.g. a `SpatialMamba`.

  Raises:
    ValueError: the name, a field or a value is wrong, or the weights are of
      another model.
    OSError: there are no such weights.
  """
  config = get_model_config(name, **overrides)
  if pretrained is None:
    return config.family.classifier(config, rngs=_required(rngs))
  found, tensors = _read(pretrained, revision)
  if found.heads or found.out_indices:
    raise UserError(
      f"{pretrained} is a {'segmentor' if found.heads else 'backbone'} without"
      " a classifier's head: load it by from_pretrained or create_backbone"
    )
  config = _agreed(name, config, found.config, pretrained)
  model = abstract_network(found._replace(config=config))
  assert isinstance(model, Classifier)
  _fill(model, tensors, name, pretrained)
  if overrides.get("num_classes", config.num_classes) != config.num_classes:
    model.reset_classifier(overrides["num_classes"], rngs=_required(rngs))
  return model


def create_backbone(
  name: str,
  *,
  out_indices: Sequence[int] = (0, 1, 2, 3),
  pretrained: Path | None = None,
  revision: str | None = None,
  rngs: nnx.Rngs | None = None,
  **overrides: Any,
) -> Backbone:
  """Creates a backbone for dense tasks, in eval mode.

  Args:
    name: one of `list_models()`.
    out_indices: indices of the stages whose features are returned.
    pretrained: weights of a classifier, a backbone or a segmentor; see
      `create_model`. Norms of features that it lacks keep their initial values.
    revision: as for `create_model`.
    rngs: random streams; `params` initialises the weights. Not needed with
      `pretrained`.
    **overrides: fields of `ModelConfig` to replace.

  Returns:
    A backbone of the name's family, e.g. a `SpatialMambaBackbone`.

  Raises:
    ValueError: as for `create_model`.
    OSError: as for `create_model`.
  """
  config = get_model_config(name, **overrides)
  if pretrained is None:
    return config.family.backbone(
      config, out_indices=out_indices, rngs=_required(rngs)
    )
  found, tensors = _read(pretrained, revision)
  config = _agreed(name, config, found.config, pretrained)
  model = abstract_network(Architecture(config, tuple(out_indices)))
  assert isinstance(model, Backbone)
  _fill(model, _of_backbone(tensors, found, out_indices), name, pretrained)
  return model


def _required(rngs: nnx.Rngs | None) -> nnx.Rngs:
  if rngs is None:
    raise UserError("new weights are random: pass rngs=nnx.Rngs(0)")
  return rngs


def _read(
  path: Path, revision: str | None
) -> tuple[Architecture, dict[str, np.ndarray]]:
  """Returns the architecture and the tensors of a file or directory."""
  if pathlib.Path(path).is_file():
    tensors = read_file(pathlib.Path(path)).whole
  else:
    directory = directory_of(path, revision)
    if (directory / CONFIG).exists():
      return read_directory(directory)
    if not is_of_weights(directory):
      raise UserError(
        f"{path} has no weights in files; make a run a directory of them first:"
        f" python -m spatial_mamba_jax.convert {path} DIRECTORY"
      )
    tensors = read_file(directory).whole
  try:
    return infer_architecture(tensors), tensors
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error


def _agreed(
  name: str, wanted: ModelConfig, found: ModelConfig, path: Path
) -> ModelConfig:
  """Returns the architecture of the weights, with the settings wanted.

  Raises:
    UserError: it is not the architecture of that name.
  """
  fields = ("family", "dims", "depths", "in_channels", "mixer")
  for field in fields:
    one, other = (_comparable(x, field) for x in (wanted, found))
    if one != other:
      raise UserError(
        f"{path} is no {name} with these settings: its {field} is {other}, not"
        f" {one}"
      )
  return dataclasses.replace(
    wanted,
    num_classes=found.num_classes,
    mlp_ratio=found.mlp_ratio,
    preprocessing=found.preprocessing,
    class_names=found.class_names,
  )


def _comparable(config: ModelConfig, field: str) -> Any:
  match field:
    case "family":
      return config.family.name
    case "mixer":
      fields = dataclasses.asdict(config.mixer)
      fields.pop("implementation", None)
      return {"name": config.mixer.name, **fields}
  return getattr(config, field)


def _of_backbone(
  tensors: dict[str, np.ndarray],
  found: Architecture,
  out_indices: Sequence[int],
) -> dict[str, np.ndarray]:
  """Returns the tensors of a backbone with these features."""
  prefix = "backbone." if found.heads else ""
  end = named(found.config.family).end
  # Of a classifier, or of features that are not wanted.
  others = (f"{end}norm.", f"{end}head.")
  backbone = {
    key.removeprefix(prefix): tensor
    for key, tensor in tensors.items()
    if key.startswith(prefix) and not key.startswith(others)
  }
  norms = {f"outnorm{i}": found.config.dims[i] for i in out_indices}
  kept = {
    key: tensor
    for key, tensor in backbone.items()
    if not key.startswith("outnorm") or key.rpartition(".")[0] in norms
  }
  for norm, dim in norms.items():
    kept.setdefault(f"{norm}.weight", np.ones(dim, np.float32))
    kept.setdefault(f"{norm}.bias", np.zeros(dim, np.float32))
  return {key: x for key, x in kept.items() if not is_counter(key)}


def _fill(
  model: nnx.Module, tensors: dict[str, np.ndarray], name: str, path: Path
) -> None:
  try:
    from_torch(model, tensors)
  except ValueError as error:
    raise UserError(f"{path} is no {name}: {error}") from error
