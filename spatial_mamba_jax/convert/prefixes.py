"""The tensors of a Spatial-Mamba among those of what it was wrapped in."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from spatial_mamba_jax.convert.messages import short
from spatial_mamba_jax.convert.names import is_counter

# What PyTorch's wrappers put before the names of the module that they wrap, at
# any depth: DistributedDataParallel and AveragedModel, torch.compile, FSDP,
# activation checkpointing.
_WRAPPERS = re.compile(
  r"(?:^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module"
  r"|_checkpoint_wrapped_module)\."
)
# Every Spatial-Mamba has tensors of this name, and hardly anything else has.
_ANCHOR = "layers.0.blocks.0.self_attention."
# In one file: every name is compared with the prefixes of all.
_MAX_MODELS = 16
_AVERAGE = re.compile(r"(^|[._])(ema|average|averaged|avg|swa)([._]|$)")


class Unwrapped(NamedTuple):
  """The tensors of one model.

  Attributes:
    tensors: {name in the model: array}.
    prefixes: what stood before its names, e.g. ("module.", "backbone.").
    others: the prefixes of other models, as they are in the file.
    left_out: the names of the tensors that are not the model's.
  """

  tensors: dict[str, np.ndarray]
  prefixes: tuple[str, ...]
  others: tuple[str, ...]
  left_out: tuple[str, ...]


def is_average(name: str) -> bool:
  """Whether a key or prefix says that weights are a moving average."""
  return bool(_AVERAGE.search(name))


def unwrapped(
  state_dict: Mapping[str, np.ndarray], *, raw: bool = False
) -> Unwrapped:
  """Leaves the prefixes out by which wrappers and detectors name a model.

  Of several models in a file, a moving average is preferred, then the one with
  the shortest prefix.

  Args:
    state_dict: {name in the file: array}.
    raw: whether a moving average is not preferred.

  Raises:
    ValueError: two tensors have one name but for wrappers, or there are too
      many models.
  """
  wrappers: dict[str, None] = {}
  names: dict[str, str] = {}
  for name in state_dict:
    wrappers |= dict.fromkeys(f"{word}." for word in _WRAPPERS.findall(name))
    plain = _WRAPPERS.sub("", name)
    if plain in names:
      raise ValueError(
        f"{short(names[plain])} and {short(name)} are one tensor but for"
        " wrappers: save the weights of one model"
      )
    names[plain] = name
  prefixes = {
    plain[:at]: name.removesuffix(plain[at:])
    for plain, name in names.items()
    if (at := _anchor(plain)) >= 0
  }
  if len(prefixes) > _MAX_MODELS:
    raise ValueError(
      f"it has {len(prefixes):,} models, of which {_MAX_MODELS} are allowed"
    )
  prefix = min(
    prefixes, key=lambda x: (is_average(x) == raw, len(x)), default=""
  )
  # "" is a prefix of all others.
  apart = tuple(x for x in prefixes if x != prefix and x.startswith(prefix))
  tensors, left_out = {}, []
  for plain, name in names.items():
    is_its = plain.startswith(prefix) and not plain.startswith(apart)
    if is_its and not is_counter(plain):
      tensors[plain.removeprefix(prefix)] = state_dict[name]
    else:
      left_out.append(name)
  others = tuple(name for x, name in prefixes.items() if x != prefix and name)
  return Unwrapped(
    tensors, (*wrappers, *[prefix] * bool(prefix)), others, tuple(left_out)
  )


def _anchor(name: str) -> int:
  """Where the name in the model begins, -1 if it is another tensor's."""
  at = name.find(_ANCHOR)
  return at if at == 0 or name[at - 1 : at] == "." else -1
