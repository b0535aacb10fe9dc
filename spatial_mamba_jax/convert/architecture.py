"""Which model a state dict is of, as far as its tensors tell."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.spatial_mamba import (
  SpatialMamba,
  SpatialMambaBackbone,
  Trunk,
)

_BLOCK = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,4})\.")


def infer_config(state_dict: Mapping[str, np.ndarray]) -> ModelConfig:
  """The architecture whose `from_torch` takes these tensors.

  What they cannot tell (drop_path_rate, dtype, implementation; num_classes of
  a backbone) is `ModelConfig`'s default.

  Args:
    state_dict: {the authors' tensor name: array}.

  Raises:
    ValueError: they are not a Spatial-Mamba's; a tensor is named that should
      be there.
  """
  blocks = {
    (int(match[1]), int(match[2]))
    for match in map(_BLOCK.match, state_dict)
    if match
  }
  depths = {
    stage: len(list(group))
    for stage, group in itertools.groupby(sorted(blocks), lambda x: x[0])
  }
  stages = range(max(depths, default=0) + 1)
  first = "layers.{}.blocks.0."
  dims = tuple(
    _shape(state_dict, first.format(i) + "ln_1.weight", 1)[0] for i in stages
  )
  inner, d_state = _shape(
    state_dict, first.format(0) + "self_attention.A_logs", 2
  )
  hidden = [
    _shape(state_dict, first.format(i) + "mlp.fc1.weight", 2)[0] for i in stages
  ]
  num_classes = ModelConfig.num_classes
  if not _out_indices(state_dict):
    num_classes = _shape(state_dict, "head.weight", 2)[0]
  return ModelConfig(
    dims=dims,
    depths=tuple(depths[i] for i in stages),
    num_classes=num_classes,
    d_state=d_state,
    expand=inner // dims[0],
    mlp_ratio=_mlp_ratio(dims, hidden),
  )


def abstract_model(
  config: ModelConfig, out_indices: Sequence[int] = ()
) -> Trunk:
  """A model of shapes alone, which `from_torch` fills.

  A backbone where it has `out_indices`, else a classifier.
  """

  def create():
    rngs = nnx.Rngs(0)
    if out_indices:
      return SpatialMambaBackbone(config, out_indices=out_indices, rngs=rngs)
    return SpatialMamba(config, rngs=rngs)

  return nnx.eval_shape(create)


def infer_model(state_dict: Mapping[str, np.ndarray]) -> Trunk:
  """A model of shapes alone, a backbone where there are `outnorm{i}`.

  Raises:
    ValueError: as `infer_config`.
  """
  return abstract_model(infer_config(state_dict), _out_indices(state_dict))


def _out_indices(state_dict: Mapping[str, np.ndarray]) -> list[int]:
  names = (re.fullmatch(r"outnorm(\d)\.weight", name) for name in state_dict)
  return sorted(int(name[1]) for name in names if name)


def _shape(
  state_dict: Mapping[str, np.ndarray], name: str, ndim: int
) -> tuple[int, ...]:
  """Of a tensor that every Spatial-Mamba has."""
  if name not in state_dict:
    there = ", ".join(list(state_dict)[:3]) or "none"
    raise ValueError(
      f"these are no weights of a Spatial-Mamba: {name} is missing among"
      f" {len(state_dict)} tensors ({there}, ...)"
    )
  shape = state_dict[name].shape
  if len(shape) != ndim or 0 in shape:
    raise ValueError(f"{name} is {list(shape)} instead of {ndim} axes")
  return shape


def _mlp_ratio(dims: Sequence[int], hidden: Sequence[int]) -> float:
  """The smallest that gives every stage its hidden channels or more."""
  ratio = max(h / dim for h, dim in zip(hidden, dims, strict=True))
  is_low = any(
    int(ratio * dim) < h for h, dim in zip(hidden, dims, strict=True)
  )
  # A quotient of floats can fall just short of what it was made from.
  return math.nextafter(ratio, math.inf) if is_low else ratio
