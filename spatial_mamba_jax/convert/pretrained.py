"""Saves and loads models as directories in the layout of Hugging Face's hub."""

import dataclasses
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from spatial_mamba_jax.convert.architecture import (
  Architecture,
  Heads,
  Model,
  abstract_network,
  infer_architecture,
  infer_model,
)
from spatial_mamba_jax.convert.families import (
  TITLES,
  FamilyNames,
  named,
  names_of,
)
from spatial_mamba_jax.convert.files import (
  SAFETENSORS,
  Found,
  written_whole,
)
from spatial_mamba_jax.convert.hub import directory_of
from spatial_mamba_jax.convert.model_card import UNKNOWN, Provenance, card_text
from spatial_mamba_jax.convert.names import (
  check_tensors,
  from_torch,
  to_torch,
)
from spatial_mamba_jax.convert.preprocessor_file import (
  PREPROCESSOR,
  preprocessor_text,
)
from spatial_mamba_jax.convert.pretrained_config import (
  CONFIG,
  config_text,
  flat_fields,
  read_config,
)
from spatial_mamba_jax.convert.safetensors_file import (
  import_safetensors,
  read_safetensors,
  write_safetensors,
)
from spatial_mamba_jax.models.backbone import Backbone, Classifier
from spatial_mamba_jax.models.mixers import MIXERS
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.paths import local_path

# Fields that affect neither the weights nor their shapes.
_OVERRIDES = (
  *("drop_path_rate", "dtype", "implementation", "layer_implementation"),
)


def save_pretrained(
  model: Model,
  path: str | os.PathLike[str],
  *,
  provenance: Provenance = UNKNOWN,
) -> None:
  """Writes a directory that `from_pretrained` and the Hugging Face hub read.

  The directory has a `config.json`; a `preprocessor_config.json`; a
  `model.safetensors` with the authors' tensor names and PyTorch's layout, which
  the authors' code can read as well; and a `README.md`, the hub's model card.

  Args:
    model: from `create_model`, `create_backbone`, `create_segmentor` or
      `from_pretrained`. The head of a classifier may be replaced by an
      `nnx.Linear` with other classes.
    path: a new or empty directory. A failure leaves nothing there.
    provenance: what the model card says of the weights.

  Raises:
    FileExistsError: `path` exists and is not an empty directory.
    OSError: `path` cannot be written.
    ValueError: `config.json` cannot describe the model: it is of another
      family, or has a mixer or another part of your own.
    ImportError: safetensors is missing.
  """
  import_safetensors()
  names = _names(model)
  architecture = _architecture(model)
  tensors = to_torch(model)
  like = abstract_network(architecture)
  try:
    check_tensors(like, tensors)
  except ValueError as error:
    raise ValueError(
      f"a changed model cannot be described by {CONFIG}: {error}"
    ) from error
  with written_whole(local_path(path)) as part:
    part.mkdir()
    text = config_text(architecture, type(model).__name__)
    (part / CONFIG).write_text(text, "utf-8")
    text = preprocessor_text(architecture.config.preprocessing)
    (part / PREPROCESSOR).write_text(text)
    write_safetensors(part / SAFETENSORS, tensors)
    text = card_text(names, model, architecture, provenance)
    (part / "README.md").write_text(text, "utf-8")


def from_pretrained(
  path: str | os.PathLike[str],
  *,
  revision: str | None = None,
  **overrides: Any,
) -> Model:
  """Loads a model that `save_pretrained` wrote.

      model = smj.from_pretrained("spatial_mamba_tiny", dtype="bfloat16")

  Args:
    path: a directory with `config.json` and `model.safetensors`; or the name of
      a repository of the Hugging Face hub, "org/name", which is fetched unless
      it is in huggingface_hub's cache.
    revision: branch, tag or commit of a repository; None for its main branch.
    **overrides: `drop_path_rate`, `dtype` or `layer_implementation` of
      `ModelConfig`, or `implementation` of its mixer. They replace the values
      in the directory.

  Returns:
    A classifier or backbone of its family, or a segmentor, in eval mode.

  Raises:
    OSError: the directory or a file in it does not exist, or the repository
      can neither be fetched nor found in the cache.
    ValueError: a file is damaged, the files do not match, or an override is
      wrong.
    ImportError: `path` is of the hub, and huggingface_hub is missing.
  """
  for name in overrides:
    if name not in _OVERRIDES:
      raise ValueError(
        f"{name!r} cannot be overridden: choose from {', '.join(_OVERRIDES)}"
      )
  directory = directory_of(path, revision)
  architecture, tensors = read_directory(directory, overrides)
  model = abstract_network(architecture)
  try:
    from_torch(model, tensors)
  except ValueError as error:
    raise ValueError(f"{directory}: {error}") from error
  return model


def model_of(found: Found) -> Model:
  """Creates the model of the weights that were found.

  Raises:
    ValueError: they are those of no model.
  """
  tensors, trained = found.whole, found.trained
  model = infer_model(tensors, trained.mixer)
  trunk = model.backbone if isinstance(model, Segmentor) else model
  names = trained.class_names
  if isinstance(model, Backbone) or len(names) != trunk.config.num_classes:
    names = ()
  trunk.config = dataclasses.replace(
    trunk.config, preprocessing=trained.preprocessing, class_names=names
  )
  from_torch(model, tensors)
  return model


def read_directory(
  path: pathlib.Path, overrides: Mapping[str, Any] = types.MappingProxyType({})
) -> tuple[Architecture, dict[str, np.ndarray]]:
  """Reads what `save_pretrained` wrote.

  Args:
    path: the directory.
    overrides: as for `from_pretrained`.

  Returns:
    The architecture, and {the authors' tensor name: array}.

  Raises:
    OSError: a file does not exist.
    ValueError: a file is damaged, or the files do not match.
  """
  architecture = read_config(path / CONFIG, overrides)
  tensors = read_safetensors(path / SAFETENSORS)
  config = architecture.config
  is_own = type(config.mixer) is named(config.family).mixer
  try:
    inferred = infer_architecture(tensors, None if is_own else config.mixer)
    _check_config(architecture, inferred)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return architecture._replace(head_bias=inferred.head_bias), tensors


def _names(model: Model) -> FamilyNames:
  """Returns the names of a model's family, which a config.json can describe."""
  trunk = model.backbone if isinstance(model, Segmentor) else model
  names = names_of(trunk) if isinstance(trunk, Classifier | Backbone) else None
  if names is None or names.family != model.config.family:
    raise ValueError(
      f"a {type(model).__name__} is not a {TITLES} with the parts of its"
      f" authors: {CONFIG} describes no other network"
    )
  mixer = model.config.mixer
  if type(mixer) is not type(MIXERS.get(mixer.name)):
    raise ValueError(
      f"a {names.title} with the mixer {mixer.name} cannot be described by"
      f" {CONFIG}: its mixer must be one of {', '.join(MIXERS)}"
    )
  return names


def _architecture(model: Model) -> Architecture:
  """Returns the current architecture."""
  if isinstance(model, Segmentor):
    return Architecture(model.config, (), Heads(*model.channels))
  if isinstance(model, Backbone):
    return Architecture(model.config, tuple(sorted(map(int, model.norms))))
  assert isinstance(model, Classifier)
  head = model.head
  if type(head) is not nnx.Linear:
    raise ValueError(
      f"model.head is a {type(head).__name__}, which {CONFIG} cannot describe:"
      f" make it an nnx.Linear({model.config.dims[-1]}, num_classes)"
    )
  config, classes = model.config, head.kernel.shape[-1]
  if classes != config.num_classes:
    config = dataclasses.replace(config, num_classes=classes, class_names=())
  return Architecture(config, head_bias=head.bias is not None)


def _check_config(written_to: Architecture, inferred: Architecture) -> None:
  written, actual = (
    flat_fields(x.config) | (x.heads._asdict() if x.heads else {})
    for x in (written_to, inferred)
  )
  for field in (
    *("model_type", "dims", "depths", "in_channels", "num_classes"),
    *("d_state", "expand", "gate", "conv_bias", *Heads._fields),
  ):
    if written.get(field) != actual.get(field):
      raise ValueError(
        f"{CONFIG} has {field} {written.get(field)}, and {SAFETENSORS} has"
        f" {actual.get(field)}"
      )
