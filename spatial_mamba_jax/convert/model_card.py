"""Writes the model card of a directory of weights, for the Hugging Face hub."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from spatial_mamba_jax.convert.architecture import Architecture, Model
from spatial_mamba_jax.convert.families import FamilyNames
from spatial_mamba_jax.models.mixers import MIXERS
from spatial_mamba_jax.models.summary import summary


@dataclasses.dataclass(frozen=True)
class Provenance:
  """Where weights come from, for their model card.

  Attributes:
    license: identifier of their licence on the hub, e.g. "apache-2.0".
    origin: where they come from, e.g. "the authors' tiny.pth".
    experiment: the config they were trained with, as nested dictionaries.
    commit: the commit of this project that trained them.
    evaluation: {name: value} of their evaluation.
  """

  license: str = "unknown"
  origin: str = ""
  experiment: Mapping[str, Any] | None = None
  commit: str = ""
  evaluation: Mapping[str, Any] | None = None


UNKNOWN = Provenance()


class _Kind(NamedTuple):
  """A kind of model.

  Attributes:
    name: the kind.
    task: the task on the hub.
    result: what a call returns.
  """

  name: str
  task: str
  result: str


_CLASSIFIER = _Kind("classifier", "image-classification", "logits")
_BACKBONE = _Kind("backbone", "image-feature-extraction", "features")
_SEGMENTOR = _Kind("segmentor", "image-segmentation", "logits")


def card_text(
  names: FamilyNames,
  model: Model,
  architecture: Architecture,
  provenance: Provenance,
) -> str:
  """Returns the content of the README.md."""
  _, out_indices, heads, _ = architecture
  kind = _SEGMENTOR if heads else _BACKBONE if out_indices else _CLASSIFIER
  sections = [
    _front_matter(names, kind, provenance),
    f"# {names.title} {kind.name}",
    _description(names, kind, architecture),
    _table(model, architecture),
    _use(kind),
    _preprocessing(architecture),
    _training(provenance),
    _format(names, architecture),
  ]
  return "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(names, kind, provenance):
  tags = (names.title.lower(), "state-space-model", "vision", "jax", "flax")
  return "\n".join(
    [
      "---",
      "library_name: spatial-mamba-jax",
      # Quoted, because the text may be anything.
      f"license: {json.dumps(provenance.license)}",
      f"pipeline_tag: {kind.task}",
      "tags:",
      *(f"- {tag}" for tag in tags),
      "---",
    ]
  )


def _description(names, kind, architecture):
  article = "UPerNet on a" if kind is _SEGMENTOR else "A"
  mixer = architecture.config.mixer
  is_own = type(mixer) is names.mixer
  with_mixer = "" if is_own else f", with the token mixer `{mixer.name}`"
  return (
    f"{article} [{names.title}]({names.paper}) {kind.name}{with_mixer}, in"
    " JAX and Flax."
  )


def _table(model, architecture):
  config, out_indices, heads, _ = architecture
  counted = summary(model)
  size = config.preprocessing.image_size
  rows = {
    "parameters": f"{counted.total.parameters:,}",
    f"GMAC at {size} x {size}": f"{counted.total.macs / 1e9:.3g}",
    "channels of the stages": ", ".join(map(str, config.dims)),
    "blocks of the stages": ", ".join(map(str, config.depths)),
    "token mixer": config.mixer.name,
  }
  if hasattr(config.mixer, "d_state"):
    rows["states a channel"] = str(config.mixer.d_state)
  if not out_indices:
    rows["classes"] = f"{config.num_classes:,}"
  if heads:
    rows["channels of the heads"] = ", ".join(map(str, heads))
  lines = [f"| {name} | {value} |" for name, value in rows.items()]
  return "\n".join(["| | |", "| --- | --- |", *lines])


def _use(kind):
  return f"""\
```python
import spatial_mamba_jax as smj

model = smj.from_pretrained("path/to/this/directory")  # or "org/name"
{kind.result} = model(images)  # [B, H, W, 3], float32
```"""


def _preprocessing(architecture):
  expected = architecture.config.preprocessing
  return (
    "Images are RGB. Their shorter side is resized to"
    f" {expected.short_side} pixels, and the central square of"
    f" {expected.image_size} pixels is cropped. Pixels in [0, 1] are normalised"
    f" by the mean {_tuple(expected.mean)} and the standard deviation"
    f" {_tuple(expected.std)}. `smj.create_transform(model)` does all this."
  )


def _tuple(values):
  return f"({', '.join(map(str, values))})"


def _training(provenance):
  parts = ["## Training and evaluation"]
  if provenance.origin:
    parts.append(f"The weights come from {provenance.origin}.")
  if provenance.evaluation:
    rows = (
      f"| {name} | {_value(value)} |"
      for name, value in provenance.evaluation.items()
    )
    parts.append("\n".join(["| evaluation | |", "| --- | --- |", *rows]))
  if provenance.experiment:
    commit = f", commit `{provenance.commit}`" if provenance.commit else ""
    text = json.dumps(provenance.experiment, indent=1)
    parts.append(
      f"They were trained by `spatial_mamba_jax`{commit}, with this config:"
      f"\n\n```json\n{text}\n```"
    )
  if len(parts) == 1:
    parts.append("Nothing is known of the training of these weights.")
  return "\n\n".join(parts)


def _value(value):
  return f"{value:.6g}" if isinstance(value, float) else str(value)


def _format(names, architecture):
  mixer = architecture.config.mixer
  text = (
    "## Format\n\n`model.safetensors` has the tensor names and the layout of"
    f" the authors' PyTorch code ({names.repository})"
  )
  if type(mixer) is names.mixer:
    text += ", whose `load_state_dict` accepts them unchanged."
  elif mixer.name in MIXERS:
    text += ", and in the blocks those of the mixer's authors."
  return (
    f"{text} `config.json` has the fields of `spatial_mamba_jax.ModelConfig`,"
    " and of a segmentor the channels of its heads. The JAX network is equal to"
    " the authors' code: outputs and gradients agree to 1e-9 in float64 (the"
    " tests of spatial_mamba_jax)."
  )
