"""Saves and loads models as directories in the layout of Hugging Face's hub."""

import dataclasses
import os
from typing import Any

import numpy as np
from flax import nnx

from spatial_mamba_jax.convert.architecture import (
  Architecture,
  Heads,
  Model,
  abstract_network,
  infer_architecture,
)
from spatial_mamba_jax.convert.families import (
  TITLES,
  FamilyNames,
  names_of,
)
from spatial_mamba_jax.convert.files import (
  SAFETENSORS,
  written_whole,
)
from spatial_mamba_jax.convert.names import (
  check_tensors,
  from_torch,
  to_torch,
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
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.paths import local_path

# Fields that affect neither the weights nor their shapes.
_OVERRIDES = (
  *("drop_path_rate", "dtype", "implementation", "layer_implementation"),
)

_CARD = """\
---
library_name: spatial-mamba-jax
license: unknown
pipeline_tag: {task}
tags:
- {tag}
- state-space-model
- vision
- jax
- flax
---

# {title} {kind}

{article} [{title}]({paper}){with_heads} of {parameters:,} parameters:
dims {dims}, depths {depths}, {d_state} states a channel{classes}.

```python
import spatial_mamba_jax as smj

model = smj.from_pretrained("path/to/this/directory")
{result} = model(images)  # [B, H, W, 3], float32
```

Images are RGB in [0, 1], minus the mean (0.485, 0.456, 0.406), divided by the
standard deviation (0.229, 0.224, 0.225).

`model.safetensors` has the tensor names and the layout of the authors' PyTorch
code ({repository}), whose `load_state_dict`
accepts them unchanged. `config.json` has the fields of
`spatial_mamba_jax.ModelConfig`, and of a segmentor the channels of its heads.

To the publisher: state here what the model was trained on and how accurate it
is, and set `license` above.
"""


def save_pretrained(model: Model, path: str | os.PathLike[str]) -> None:
  """Writes a directory that `from_pretrained` reads.

  The directory has a `config.json`; a `model.safetensors` with the authors'
  tensor names and PyTorch's layout, which the authors' code can read as well;
  and a `README.md`, the hub's model card, for the publisher to complete.

  Args:
    model: from `create_model`, `create_backbone`, `create_segmentor` or
      `from_pretrained`. The head of a classifier may be replaced by an
      `nnx.Linear` with other classes.
    path: a new or empty directory. A failure leaves nothing there.

  Raises:
    FileExistsError: `path` exists and is not an empty directory.
    OSError: `path` cannot be written.
    ValueError: `config.json` cannot describe the model: it is of another
      family, or has another mixer or another part than the family's own.
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
    (part / CONFIG).write_text(text)
    write_safetensors(part / SAFETENSORS, tensors)
    (part / "README.md").write_text(_card(names, architecture, tensors))


def from_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Model:
  """Loads a model that `save_pretrained` wrote; needs no network.

      model = smj.from_pretrained("spatial_mamba_tiny", dtype="bfloat16")

  Args:
    path: a directory with `config.json` and `model.safetensors`.
    **overrides: `drop_path_rate`, `dtype` or `layer_implementation` of
      `ModelConfig`, or `implementation` of its mixer. They replace the values
      in the directory.

  Returns:
    A classifier or backbone of its family, or a segmentor, in eval mode.

  Raises:
    OSError: the directory or a file in it does not exist.
    ValueError: a file is damaged, the two files do not match, or an override is
      wrong.
  """
  for name in overrides:
    if name not in _OVERRIDES:
      raise ValueError(
        f"{name!r} cannot be overridden: choose from {', '.join(_OVERRIDES)}"
      )
  path = local_path(path)
  if not path.is_dir():
    raise FileNotFoundError(
      f"{path} is not a directory: download one first, e.g. with hf download"
    )
  architecture = read_config(path / CONFIG, overrides)
  tensors = read_safetensors(path / SAFETENSORS)
  try:
    inferred = infer_architecture(tensors)
    _check_config(architecture, inferred)
    model = abstract_network(
      architecture._replace(head_bias=inferred.head_bias)
    )
    from_torch(model, tensors)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return model


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
  if type(mixer) is not names.mixer:
    raise ValueError(
      f"a {names.title} with the mixer {mixer.name} cannot be described by"
      f" {CONFIG}: its mixer must be {names.mixer.name}"
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
  classes = head.kernel.shape[-1]
  config = dataclasses.replace(model.config, num_classes=classes)
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


# {kind of a model: (task of the hub, result of a call)}.
_KINDS = {
  "classifier": ("image-classification", "logits"),
  "backbone": ("image-feature-extraction", "features"),
  "segmentor": ("image-segmentation", "logits"),
}


def _card(
  names: FamilyNames,
  architecture: Architecture,
  tensors: dict[str, np.ndarray],
) -> str:
  config, out_indices, heads, _ = architecture
  statistics = ("running_mean", "running_var", "num_batches_tracked")
  kind = "segmentor" if heads else "backbone" if out_indices else "classifier"
  task, result = _KINDS[kind]
  return _CARD.format(
    tag=names.title.lower(),
    title=names.title,
    paper=names.paper,
    repository=names.repository,
    article="UPerNet on a" if heads else "A",
    with_heads=" backbone," if heads else "",
    task=task,
    kind=kind,
    result=result,
    classes="" if out_indices else f", {config.num_classes} classes",
    parameters=sum(
      tensor.size
      for name, tensor in tensors.items()
      if not name.endswith(statistics)
    ),
    dims=config.dims,
    depths=config.depths,
    d_state=flat_fields(config)["d_state"],
  )
