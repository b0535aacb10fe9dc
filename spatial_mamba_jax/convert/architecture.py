"""Infers the architecture of a model from the tensors of its state dict."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spatial_mamba_jax.convert.messages import listed
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.layers import linear
from spatial_mamba_jax.models.mixers import StructureAwareConfig
from spatial_mamba_jax.models.norms import BatchNorm

_BLOCK = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,4})\.")
_STEM = "patch_embed.conv1.conv.weight"
# Maximum number of blocks in all stages. The base model has 32; creating one
# takes a millisecond.
_MAX_BLOCKS = 1000


def infer_config(state_dict: Mapping[str, np.ndarray]) -> ModelConfig:
  """Infers the architecture whose tensors these are.

  Fields that the tensors do not determine have the defaults of `ModelConfig`:
  drop_path_rate, dtype, the implementations, and num_classes of a backbone.

  Args:
    state_dict: {the authors' tensor name: array}.

  Raises:
    ValueError: the tensors are not those of a Spatial-Mamba.
  """
  depths = _depths(state_dict)
  stages = range(max(depths, default=0) + 1)
  dims = tuple(
    _shape(state_dict, _first(i) + "ln_1.weight", 1)[0] for i in stages
  )
  in_channels = _shape(state_dict, _STEM, 4)[1]
  inner, d_state = _shape(state_dict, _first(0) + "self_attention.A_logs", 2)
  expand = inner // dims[0]
  for i, dim in enumerate(dims):
    _check_channels(state_dict, i, dim, expand)
  hidden = [
    _shape(state_dict, _first(i) + "mlp.fc1.weight", 2)[0] for i in stages
  ]
  num_classes = _num_classes(state_dict)
  try:
    return ModelConfig(
      dims=dims,
      depths=tuple(depths[i] for i in stages),
      in_channels=in_channels,
      num_classes=num_classes,
      mixer=StructureAwareConfig(d_state=d_state, expand=expand),
      mlp_ratio=_mlp_ratio(dims, hidden),
    )
  except ValueError as error:
    raise ValueError(f"not the weights of a Spatial-Mamba: {error}") from error


def _depths(state_dict: Mapping[str, np.ndarray]) -> dict[int, int]:
  """Returns {stage: number of blocks}."""
  blocks = {
    (int(match[1]), int(match[2]))
    for match in map(_BLOCK.match, state_dict)
    if match
  }
  if len(blocks) > _MAX_BLOCKS:
    raise ValueError(
      f"a Spatial-Mamba of {len(blocks):,} blocks is too deep: at most"
      f" {_MAX_BLOCKS:,} are allowed"
    )
  return {
    stage: len(list(group))
    for stage, group in itertools.groupby(sorted(blocks), lambda x: x[0])
  }


def _num_classes(state_dict: Mapping[str, np.ndarray]) -> int:
  """Returns the classes of a classifier; the default for a backbone."""
  if _out_indices(state_dict):
    return ModelConfig.num_classes
  if "head.weight" not in state_dict:
    raise ValueError(
      "these tensors are a classifier's without its head (head.weight), or a"
      " backbone's without its norms (outnorm0.weight, ...): config.init_from"
      " of train.py can start a run from them"
    )
  return _shape(state_dict, "head.weight", 2)[0]


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
  # All blocks of a stage are equal, and copying one is faster than tracing it.
  single = dataclasses.replace(config, depths=(1,) * len(config.depths))

  def create():
    rngs = nnx.Rngs(0)
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
  model.config = config
  for stage, depth in zip(model.stages, config.depths, strict=True):
    stage.blocks = nnx.List([nnx.clone(stage.blocks[0]) for _ in range(depth)])
  for _, module in nnx.iter_graph(model):
    if isinstance(module, BatchNorm):
      # Not a shape, because files may lack this count.
      module.num_batches.set_value(jnp.zeros((), jnp.int32))
  return model


def infer_model(state_dict: Mapping[str, np.ndarray]) -> Trunk:
  """Creates the model of these tensors, with shapes instead of arrays.

  It is a backbone if the state dict has `outnorm{i}`, else a classifier.

  Raises:
    ValueError: see `infer_config`.
  """
  config = infer_config(state_dict)
  out_indices = _out_indices(state_dict)
  stages = len(config.dims)
  if any(i >= stages for i in out_indices):
    raise ValueError(
      f"outnorm{out_indices[-1]} belongs to no stage: there are {stages} stages"
    )
  return abstract_model(
    config, out_indices, head_bias="head.bias" in state_dict
  )


def with_head_bias(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Adds a bias of zeros to the head of a classifier that has none."""
  head = state_dict.get("head.weight")
  if head is None or "head.bias" in state_dict:
    return state_dict
  return {**state_dict, "head.bias": np.zeros(head.shape[:1], head.dtype)}


def _out_indices(state_dict: Mapping[str, np.ndarray]) -> list[int]:
  names = (re.fullmatch(r"outnorm(\d)\.weight", name) for name in state_dict)
  return sorted(int(name[1]) for name in names if name)


def _first(stage: int) -> str:
  """Returns the prefix of the tensor names of a stage's first block."""
  return f"layers.{stage}.blocks.0."


def _check_channels(
  state_dict: Mapping[str, np.ndarray], stage: int, dim: int, expand: int
) -> None:
  """Checks the shape of a matrix against the channels of its stage.

  The channels come from a vector, which can claim a million of them in 4 MB.
  """
  name = _first(stage) + "self_attention.in_proj.weight"
  shape = _shape(state_dict, name, 2)
  if shape != (2 * expand * dim, dim):
    raise ValueError(
      f"{name} is {list(shape)} instead of {[2 * expand * dim, dim]}"
    )


def _shape(
  state_dict: Mapping[str, np.ndarray], name: str, ndim: int
) -> tuple[int, ...]:
  """Returns the shape of a tensor that every Spatial-Mamba has."""
  if name not in state_dict:
    raise ValueError(
      f"not the weights of a Spatial-Mamba: {name} is missing among"
      f" {len(state_dict)} tensors ({listed(state_dict) or 'none'})"
    )
  shape = state_dict[name].shape
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
