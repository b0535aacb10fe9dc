"""Finds the tensors of a model inside wrappers and larger models."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from spatial_mamba_jax.convert.families import FAMILIES
from spatial_mamba_jax.convert.messages import short
from spatial_mamba_jax.convert.names import is_counter
from spatial_mamba_jax.models.segmentor import HEADS

# Prefixes that PyTorch's wrappers add to the names of a module, at any depth:
# DistributedDataParallel and AveragedModel, torch.compile, FSDP, activation
# checkpointing.
_WRAPPERS = re.compile(
  r"(?:^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module"
  r"|_checkpoint_wrapped_module)\."
)
# The beginning of names that a model of a family has.
_ANCHOR = re.compile(
  "|".join(rf"(?:^|(?<=\.)){re.escape(names.anchor)}" for names in FAMILIES)
)
# The prefix of a segmentor's backbone in mmsegmentation, and a tensor that
# UPerNet has.
_BACKBONE = "backbone."
_OF_UPERNET = "decode_head.bottleneck.conv.weight"
# Maximum number of models in a file. Every name is compared with all prefixes.
_MAX_MODELS = 16
_AVERAGE = re.compile(r"(^|[._])(ema|average|averaged|avg|swa)([._]|$)")


class Unwrapped(NamedTuple):
  """The tensors of one model.

  Attributes:
    tensors: {name in the model: array}.
    prefixes: prefixes removed from its names, e.g. ("module.", "backbone.").
    others: the prefixes of other models in the file.
    left_out: the names of tensors that do not belong to the model.
    heads: {name beside "backbone.": array} of a segmentor's heads, of which the
      model is the backbone; empty for other models.
  """

  tensors: dict[str, np.ndarray]
  prefixes: tuple[str, ...]
  others: tuple[str, ...]
  left_out: tuple[str, ...]
  heads: dict[str, np.ndarray]


def is_average(name: str) -> bool:
  """Whether a key or prefix is the name of a moving average."""
  return bool(_AVERAGE.search(name))


def unwrapped(
  state_dict: Mapping[str, np.ndarray], *, raw: bool = False
) -> Unwrapped:
  """Removes the prefixes that wrappers and detectors add to a model's names.

  If a file has several models, moving averages are preferred, then short
  prefixes.

  Args:
    state_dict: {name in the file: array}.
    raw: whether to prefer models that are not moving averages.

  Raises:
    ValueError: two names differ only in wrappers, or there are too many models.
  """
  wrappers: dict[str, None] = {}
  names: dict[str, str] = {}
  for name in state_dict:
    wrappers |= dict.fromkeys(f"{word}." for word in _WRAPPERS.findall(name))
    plain = _WRAPPERS.sub("", name)
    if plain in names:
      raise ValueError(
        f"{short(names[plain])} and {short(name)} differ only in wrappers: save"
        " the weights of one model"
      )
    names[plain] = name
  prefixes = {
    plain[: at.start()]: name.removesuffix(plain[at.start() :])
    for plain, name in names.items()
    if (at := _ANCHOR.search(plain))
  }
  if len(prefixes) > _MAX_MODELS:
    raise ValueError(
      f"it has {len(prefixes):,} models; at most {_MAX_MODELS} are allowed"
    )
  prefix = min(
    prefixes, key=lambda x: (is_average(x) == raw, len(x)), default=""
  )
  # Models inside this one, such as all others if its prefix is "".
  nested = tuple(x for x in prefixes if x != prefix and x.startswith(prefix))
  outer = prefix.removesuffix(_BACKBONE)
  # Of other segmentors the backbone alone is read.
  is_segmentor = f"{outer}{_OF_UPERNET}" in names and outer != prefix
  of_heads = tuple(f"{outer}{head}." for head in HEADS if is_segmentor)
  tensors, heads, left_out = {}, {}, []
  for plain, name in names.items():
    is_own = plain.startswith(prefix) and not plain.startswith(nested)
    if is_counter(plain):
      left_out.append(name)
    elif is_own:
      tensors[plain.removeprefix(prefix)] = state_dict[name]
    elif plain.startswith(of_heads):
      heads[plain.removeprefix(outer)] = state_dict[name]
    else:
      left_out.append(name)
  others = tuple(name for x, name in prefixes.items() if x != prefix and name)
  return Unwrapped(
    tensors,
    (*wrappers, *[prefix] * bool(prefix)),
    others,
    tuple(left_out),
    heads,
  )
