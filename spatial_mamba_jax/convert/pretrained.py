"""Models as directories in the layout of the Hugging Face hub."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp

from spatial_mamba_jax.convert.architecture import (
  abstract_model,
  infer_config,
)
from spatial_mamba_jax.convert.files import (
  SAFETENSORS,
  read_safetensors,
  write_safetensors,
  written_whole,
)
from spatial_mamba_jax.convert.names import from_torch, to_torch
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.spatial_mamba import SpatialMambaBackbone, Trunk

_CONFIG = "config.json"
# What changes neither the weights nor their shapes.
_OVERRIDES = ("drop_path_rate", "dtype", "implementation")

_CARD = """\
---
library_name: spatial-mamba-jax
license: unknown
pipeline_tag: {task}
tags:
- spatial-mamba
- state-space-model
- vision
- jax
- flax
---

# Spatial-Mamba {kind}

A [Spatial-Mamba](https://arxiv.org/abs/2410.15091) of {parameters:,}
parameters: dims {dims}, depths {depths}, {d_state} states a channel{classes}.

```python
import spatial_mamba_jax as smj

model = smj.from_pretrained("path/to/this/directory")
{result} = model(images)  # [B, H, W, 3], float32
```

Images are RGB in [0, 1], less the mean (0.485, 0.456, 0.406), over the standard
deviation (0.229, 0.224, 0.225).

`model.safetensors` has the tensor names and the layout of the authors' PyTorch
code (https://github.com/EdwardChasel/Spatial-Mamba), whose `load_state_dict`
takes it as it is. `config.json` has the fields of
`spatial_mamba_jax.ModelConfig`.

Who publishes this directory states here what the model was trained on and how
accurate it is, and above its `license`.
"""


def save_pretrained(model: Trunk, path: str | os.PathLike[str]) -> None:
  """Writes a directory that `from_pretrained` reads.

  It has a `config.json`; a `model.safetensors` with the authors' tensor names
  and PyTorch's layout, so that their code and this project's share one file;
  and a `README.md`, the hub's model card, for its publisher to complete.

  Args:
    model: from `create_model`, `create_backbone` or `from_pretrained`.
    path: a directory that is new or empty. It appears whole or not at all.

  Raises:
    FileExistsError: `path` exists, and is no empty directory.
    ImportError: safetensors is missing.
  """
  tensors = to_torch(model)
  with written_whole(pathlib.Path(path)) as part:
    part.mkdir()
    (part / _CONFIG).write_text(json.dumps(_config_of(model), indent=2) + "\n")
    write_safetensors(part / SAFETENSORS, tensors)
    (part / "README.md").write_text(_card(model))


def from_pretrained(path: str | os.PathLike[str], **overrides: Any) -> Trunk:
  """Reads a model that `save_pretrained` wrote; no network is needed.

      model = smj.from_pretrained("spatial_mamba_tiny", dtype="bfloat16")

  Args:
    path: a directory with `config.json` and `model.safetensors`.
    **overrides: `drop_path_rate`, `dtype` or `implementation` of
      `ModelConfig`, in place of what the directory has.

  Returns:
    A `SpatialMamba` or `SpatialMambaBackbone`, in eval mode.

  Raises:
    OSError: there is no such directory, or it lacks a file.
    ValueError: a file is damaged, the two do not fit each other, or an
      override is wrong.
    ImportError: safetensors is missing.
  """
  for name in overrides:
    if name not in _OVERRIDES:
      raise ValueError(
        f"{name!r} cannot be overridden: choose from {', '.join(_OVERRIDES)}"
      )
  path = pathlib.Path(path)
  if not path.is_dir():
    raise FileNotFoundError(
      f"{path} is no directory: download one first, e.g. with hf download"
    )
  config, out_indices = _read_config(path / _CONFIG, overrides)
  tensors = read_safetensors(path / SAFETENSORS)
  try:
    _check_config(config, infer_config(tensors))
    model = abstract_model(config, out_indices)
    from_torch(model, tensors)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return model


def _config_of(model: Trunk) -> dict[str, Any]:
  config = dataclasses.asdict(model.config)
  del config["implementation"]  # What is best depends on the device.
  config["dtype"] = jnp.dtype(model.config.dtype).name
  if isinstance(model, SpatialMambaBackbone):
    del config["num_classes"]
    config["out_indices"] = sorted(map(int, model.norms))
  return {
    "architectures": [type(model).__name__],
    "model_type": "spatial_mamba",
    **config,
  }


def _read_config(
  path: pathlib.Path, overrides: dict[str, Any]
) -> tuple[ModelConfig, tuple[int, ...]]:
  """The architecture, and the stages whose features a backbone returns."""
  try:
    config = json.loads(path.read_text())
    if config.pop("model_type") != "spatial_mamba":
      raise ValueError("its model_type is not spatial_mamba")
    config.pop("architectures", None)
    for key in ("dims", "depths", "out_indices"):
      config[key] = tuple(map(int, config.get(key, ())))
    out_indices = config.pop("out_indices")
    config.update(overrides)
    config["dtype"] = jnp.dtype(config.get("dtype", "float32"))
    return ModelConfig(**config), out_indices
  except KeyError as error:
    raise ValueError(f"{path} has no {error}") from error
  except (AttributeError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is of no Spatial-Mamba: {error}") from error


def _check_config(config: ModelConfig, inferred: ModelConfig) -> None:
  for field in ("dims", "depths", "num_classes", "d_state", "expand"):
    said, found = getattr(config, field), getattr(inferred, field)
    if said != found:
      raise ValueError(
        f"{_CONFIG} has {field} {said}, and {SAFETENSORS} has {found}"
      )


def _card(model: Trunk) -> str:
  config = model.config
  is_backbone = isinstance(model, SpatialMambaBackbone)
  statistics = ("running_mean", "running_var", "num_batches_tracked")
  return _CARD.format(
    task="image-feature-extraction" if is_backbone else "image-classification",
    kind="backbone" if is_backbone else "classifier",
    result="features" if is_backbone else "logits",
    classes="" if is_backbone else f", {config.num_classes} classes",
    parameters=sum(
      tensor.size
      for name, tensor in to_torch(model).items()
      if not name.endswith(statistics)
    ),
    dims=config.dims,
    depths=config.depths,
    d_state=config.d_state,
  )
