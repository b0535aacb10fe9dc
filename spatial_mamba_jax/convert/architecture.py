"""Infers the architecture of a model from the tensors of its state dict."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spatial_mamba_jax.convert.families import (
  FamilyNames,
  names_of,
  names_of_tensors,
)
from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.convert.tables import matrix
from spatial_mamba_jax.models.backbone import Trunk, places
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.initializers import Streams
from spatial_mamba_jax.models.layers import linear
from spatial_mamba_jax.models.mixers import MixerConfig
from spatial_mamba_jax.models.norms import BatchNorm
from spatial_mamba_jax.models.segmentor import Segmentor

_BLOCK = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,4})\.")
# Maximum number of blocks in all stages. The base model has 32; creating one
# takes a millisecond.
_MAX_BLOCKS = 1000


Model = Trunk | Segmentor


class Heads(NamedTuple):
  """The channels of a segmentor's heads."""

  head_channels: int
  auxiliary_channels: int


class Architecture(NamedTuple):
  """What determines the names and the shapes of a model's tensors.

  Attributes:
    config: the architecture of a classifier, or of the backbone.
    out_indices: the stages whose features a backbone returns; empty for other
      models.
    heads: of a segmentor; None for other models.
    head_bias: whether the head of a classifier has a bias.
  """

  config: ModelConfig
  out_indices: tuple[int, ...] = ()
  heads: Heads | None = None
  head_bias: bool = True


def infer_config(
  state_dict: Mapping[str, np.ndarray], mixer: MixerConfig | None = None
) -> ModelConfig:
  """Infers the architecture whose tensors these are.

  Fields that the tensors do not determine have the defaults of `ModelConfig`:
  drop_path_rate, dtype, the implementations, and num_classes of a backbone.

  Args:
    state_dict: {the authors' tensor name: array}.
    mixer: the mixer; None for that of the family's authors, whose fields are
      inferred.

  Raises:
    ValueError: the tensors are those of no family.
  """
  names = names_of_tensors(state_dict)
  depths = _depths(state_dict)
  stages = range(max(depths, default=0) + 1)

  def shape(name, ndim):
    return _shape(state_dict, name, ndim, names.title)

  dims = tuple(shape(f"{_first(i)}{names.norm}.weight", 1)[0] for i in stages)
  in_channels = shape(names.stem, 4)[1]
  # The channels come from a vector, which can claim a million of them in 4 MB.
  for i, dim in enumerate(dims):
    name = f"{_first(i)}mlp.fc1.weight"
    if (found := shape(name, 2))[1] != dim:
      raise ValueError(f"{name} is {list(found)} instead of [..., {dim}]")
  if mixer is None:
    mixer = _mixer(state_dict, dims, names)
  hidden = [shape(f"{_first(i)}mlp.fc1.weight", 2)[0] for i in stages]
  num_classes = _num_classes(state_dict, names)
  try:
    return ModelConfig(
      family=names.family,
      dims=dims,
      depths=tuple(depths[i] for i in stages),
      in_channels=in_channels,
      num_classes=num_classes,
      mixer=mixer,
      mlp_ratio=_mlp_ratio(dims, hidden),
    )
  except ValueError as error:
    raise ValueError(f"not the weights of a {names.title}: {error}") from error


def _mixer(
  state_dict: Mapping[str, np.ndarray],
  dims: Sequence[int],
  names: FamilyNames,
) -> MixerConfig:
  """Infers the mixer from the first block of each stage."""
  what = f"{names.title} with the mixer {names.mixer.name}"

  def shape(name, ndim):
    return _shape(state_dict, names.anchor + name, ndim, what)

  dim = dims[0]
  inner = shape("out_norm.weight", 1)[0]
  found = {
    "d_state": shape("A_logs", 2)[1],
    "expand": inner // dim,
    "gate": shape("in_proj.weight", 2)[0] == 2 * inner,
    "conv_bias": f"{names.anchor}conv2d.bias" in state_dict,
  }
  fields = {field.name for field in dataclasses.fields(names.mixer)}
  mixer = names.mixer(**{k: x for k, x in found.items() if k in fields})
  # A mixer without this field always has a gate.
  is_gated = found["gate"] or "gate" not in fields
  width = found["expand"] * (1 + is_gated)
  for i, dim in enumerate(dims):
    name = f"{_first(i)}{names.branch}.in_proj.weight"
    if (projected := _shape(state_dict, name, 2, what)) != (width * dim, dim):
      raise ValueError(
        f"{name} is {list(projected)} instead of {[width * dim, dim]}"
      )
  return mixer


def _depths(state_dict: Mapping[str, np.ndarray]) -> dict[int, int]:
  """Returns {stage: number of blocks}."""
  blocks = {
    (int(match[1]), int(match[2]))
    for match in map(_BLOCK.match, state_dict)
    if match
  }
  if len(blocks) > _MAX_BLOCKS:
    raise ValueError(
      f"a network of {len(blocks):,} blocks is too deep: at most"
      f" {_MAX_BLOCKS:,} are allowed"
    )
  return {
    stage: len(list(group))
    for stage, group in itertools.groupby(sorted(blocks), lambda x: x[0])
  }


def _num_classes(
  state_dict: Mapping[str, np.ndarray], names: FamilyNames
) -> int:
  """Returns the classes of a classifier; the default for a backbone."""
  if _out_indices(state_dict):
    return ModelConfig.num_classes
  head = names.head_weight
  if head not in state_dict:
    raise ValueError(
      f"these tensors are a classifier's without its head ({head}), or a"
      " backbone's without its norms (outnorm0.weight, ...): config.init_from"
      " of train.py can start a run from them"
    )
  return _shape(state_dict, head, 2, names.title)[0]


def abstract_model(
  config: ModelConfig,
  out_indices: Sequence[int] = (),
  *,
  head_bias: bool = True,
) -> Trunk:
  """Creates a model with shapes instead of arrays, for `from_torch`.

  Args:
    config: the architecture.
    out_indices: the stages whose features a backbone returns; empty for a
      classifier.
    head_bias: whether the head of a classifier has a bias.
  """
  single = _with_few_blocks(config)

  def create():
    rngs = Streams(0)
    family = single.family
    if out_indices:
      return family.backbone(single, out_indices=out_indices, rngs=rngs)
    model = family.classifier(single, rngs=rngs)
    if not head_bias:
      model.head = linear(
        config.dims[-1],
        config.num_classes,
        use_bias=False,
        dtype=config.param_dtype,
        rngs=rngs,
      )
    return model

  model = nnx.eval_shape(create)
  _complete(model, model, config)
  return model


def _complete(model: nnx.Module, backbone: Trunk, config: ModelConfig) -> None:
  """Repeats the block of each stage, and sets what files may lack to 0."""
  backbone.config = config
  for stage, depth in zip(backbone.stages, config.depths, strict=True):
    if len(stage.blocks) < depth:
      block = stage.blocks[0]
      stage.blocks = nnx.List([nnx.clone(block) for _ in range(depth)])
  for _, module in nnx.iter_graph(model):
    if isinstance(module, BatchNorm):
      module.num_batches.set_value(jnp.zeros((), jnp.int32))


def abstract_segmentor(config: ModelConfig, heads: Heads) -> Segmentor:
  """Creates a segmentor with shapes instead of arrays, for `from_torch`."""
  single = _with_few_blocks(config)
  model = nnx.eval_shape(
    lambda: Segmentor(single, **heads._asdict(), rngs=Streams(0))
  )
  _complete(model, model.backbone, config)
  return model


def _with_few_blocks(config: ModelConfig) -> ModelConfig:
  """Leaves one block a stage, if all blocks have the same structure.

  Copying a block is faster than tracing it.
  """
  variants = {config.mixer.variant(x) for x in chain(*places(config.depths))}
  if len(variants) > 1:
    return config
  return dataclasses.replace(config, depths=(1,) * len(config.depths))


def infer_architecture(
  state_dict: Mapping[str, np.ndarray], mixer: MixerConfig | None = None
) -> Architecture:
  """Infers the architecture whose tensors these are.

  It is a segmentor's if the state dict has heads, a backbone's if it has
  `outnorm{i}`, else a classifier's.

  Args:
    state_dict: {the authors' tensor name: array}.
    mixer: as for `infer_config`.

  Raises:
    ValueError: see `infer_config`.
  """
  if any(name.startswith("decode_head.") for name in state_dict):
    return _segmentor(state_dict, mixer)
  config = infer_config(state_dict, mixer)
  out_indices = _out_indices(state_dict)
  stages = len(config.dims)
  if any(i >= stages for i in out_indices):
    raise ValueError(
      f"outnorm{out_indices[-1]} belongs to no stage: there are {stages} stages"
    )
  head_bias = names_of_tensors(state_dict).head_bias in state_dict
  return Architecture(config, tuple(out_indices), head_bias=head_bias)


def _segmentor(
  state_dict: Mapping[str, np.ndarray], mixer: MixerConfig | None
) -> Architecture:
  backbone = {
    name.removeprefix("backbone."): tensor
    for name, tensor in state_dict.items()
    if name.startswith("backbone.")
  }
  config = infer_config(backbone, mixer)

  def channels(name, ndim):
    what = "segmentor with UPerNet's heads"
    return _shape(state_dict, name, ndim, what)[0]

  num_classes = channels("decode_head.conv_seg.weight", 2)
  heads = Heads(
    channels("decode_head.bottleneck.conv.weight", 4),
    channels("auxiliary_head.convs.0.conv.weight", 4),
  )
  config = dataclasses.replace(config, num_classes=num_classes)
  return Architecture(config, heads=heads)


def infer_model(
  state_dict: Mapping[str, np.ndarray], mixer: MixerConfig | None = None
) -> Model:
  """Creates the model of these tensors, with shapes instead of arrays.

  Args:
    state_dict: {the authors' tensor name: array}.
    mixer: as for `infer_config`.

  Raises:
    ValueError: see `infer_architecture`.
  """
  return abstract_network(infer_architecture(state_dict, mixer))


def abstract_network(architecture: Architecture) -> Model:
  """Creates a model with shapes instead of arrays, for `from_torch`."""
  config, out_indices, heads, head_bias = architecture
  if heads:
    return abstract_segmentor(config, heads)
  return abstract_model(config, out_indices, head_bias=head_bias)


def with_head_bias(
  state_dict: dict[str, np.ndarray], model: Trunk
) -> dict[str, np.ndarray]:
  """Adds a bias of zeros to a head that has none, for a model like `model`."""
  names = names_of(model)
  weight = state_dict.get(names.head_weight)
  if weight is None or names.head_bias in state_dict:
    return state_dict
  bias = np.zeros(weight.shape[:1], weight.dtype)
  return {**state_dict, names.head_bias: bias}


def _out_indices(state_dict: Mapping[str, np.ndarray]) -> list[int]:
  names = (re.fullmatch(r"outnorm(\d)\.weight", name) for name in state_dict)
  return sorted(int(name[1]) for name in names if name)


def _first(stage: int) -> str:
  """Returns the prefix of the tensor names of a stage's first block."""
  return f"layers.{stage}.blocks.0."


def _shape(
  state_dict: Mapping[str, np.ndarray],
  name: str,
  ndim: int,
  what: str,
) -> tuple[int, ...]:
  """Returns the shape of a tensor that `what` always has."""
  if name not in state_dict:
    raise ValueError(
      f"not the weights of a {what}: {name} is missing among"
      f" {len(state_dict)} tensors ({listed(state_dict)})"
    )
  tensor = state_dict[name]
  shape = (matrix(tensor) if ndim == 2 else tensor).shape
  if len(shape) != ndim or 0 in shape:
    raise ValueError(
      f"{name} has shape {list(shape)} instead of {ndim} non-empty axes"
    )
  return shape


def _mlp_ratio(dims: Sequence[int], hidden: Sequence[int]) -> float:
  """Returns the smallest ratio that gives each stage its hidden channels."""
  ratio = max(h / dim for h, dim in zip(hidden, dims, strict=True))
  is_low = any(
    int(ratio * dim) < h for h, dim in zip(hidden, dims, strict=True)
  )
  # The rounded quotient times its divisor can be just below the dividend.
  return math.nextafter(ratio, math.inf) if is_low else ratio
