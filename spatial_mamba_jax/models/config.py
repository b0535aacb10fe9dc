"""The architectures, as the authors' configs give them."""

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from spatial_mamba_kernels.by_platform import PLATFORMS
from spatial_mamba_kernels.implementation import Implementation
from spatial_mamba_kernels.shapes import at_least_float32

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import (
  check_fields,
  choice,
  number,
  show,
  suggestion,
)

DTYPES = ("bfloat16", "float16", "float32", "float64")
IMPLEMENTATIONS = get_args(Implementation)
# Channels of a stage: twice those of the widest vision transformer, of 22
# billion parameters (arXiv 2302.05442).
MAX_CHANNELS = 2**14
# Blocks of all stages: more than the 1,001 layers of the deepest ResNet (arXiv
# 1603.05027). Each is traced, which takes a tenth of a second or more.
MAX_BLOCKS = 2**10
# Classes: a head of so many over 768 channels takes 3 GiB.
MAX_CLASSES = 2**20
# States a channel: four times those of Mamba-2 (arXiv 2405.21060), whose
# scan does not keep them.
MAX_STATES = 2**10
# Inner over outer channels, of the mixer and of the MLP; networks have 1 to 8.
MAX_EXPANSION = 2**6


def _dtype_name(dtype: Any) -> str:
  """The name of a dtype, however it is given; empty where it is none."""
  try:
    # NumPy takes None for float64.
    return "" if dtype is None else jnp.dtype(dtype).name
  except (SyntaxError, TypeError, ValueError):
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """One Spatial-Mamba architecture.

  Attributes:
    dims: channels of each stage.
    depths: blocks of each stage.
    num_classes: classes of the head.
    d_state: N, states a channel; the authors' models have 1.
    expand: inner channels of the mixer, over the channels of its stage.
    mlp_ratio: hidden channels of the MLP, over the channels of its stage.
    drop_path_rate: stochastic depth of the last block; it grows linearly from
      0 at the first.
    dtype: precision of activations. Parameters, states and statistics are
      float32, and all is float64 where this is.
    implementation: of the structure-aware SSM; see `spatial_mamba_kernels`.
      "sequential" and "associative" are without kernels for the rest, too.
    remat: whether training runs the blocks of a stage in a loop, and makes most
      of each again in the backward pass: it takes half of the memory and less
      time to compile. None: unless the default device is a GPU.
  """

  dims: tuple[int, ...] = number(least=1, most=MAX_CHANNELS)
  depths: tuple[int, ...] = number(least=1, most=MAX_BLOCKS)
  num_classes: int = number(1000, least=1, most=MAX_CLASSES)
  d_state: int = number(1, least=1, most=MAX_STATES)
  expand: int = number(2, least=1, most=MAX_EXPANSION)
  mlp_ratio: float = number(4.0, above=0, most=MAX_EXPANSION)
  drop_path_rate: float = number(0.0, least=0, below=1)
  dtype: Any = jnp.float32
  implementation: str | None = choice(None, among=IMPLEMENTATIONS)
  remat: bool | None = None

  def __post_init__(self):
    check_fields(self)
    if not self.dims or len(self.dims) != len(self.depths):
      raise UserError(
        "dims and depths must name the same stages, at least one: got"
        f" dims={show(self.dims)}, depths={show(self.depths)}"
      )
    if self.dims[0] % 2:
      raise UserError(f"dims[0] must be even, for the stem: got {self.dims}")
    if sum(self.depths) > MAX_BLOCKS:
      raise UserError(
        f"depths must be at most {MAX_BLOCKS} blocks in all, got"
        f" {show(self.depths)}"
      )
    if self.mlp_ratio * min(self.dims) < 1:
      raise UserError(
        f"mlp_ratio must leave a hidden channel of {min(self.dims)}, got"
        f" {self.mlp_ratio}"
      )
    if _dtype_name(self.dtype) not in DTYPES:
      raise UserError(
        f"dtype must be one of {', '.join(DTYPES)}, got {show(self.dtype)}"
      )

  @property
  def param_dtype(self) -> jnp.dtype:
    """float32, or float64 where `dtype` is."""
    return at_least_float32(self.dtype)

  @property
  def implementation_of_rest(self) -> str | None:
    """Of all but the SSM: a kernel's name says nothing of other kernels."""
    is_kernel = self.implementation in PLATFORMS
    return None if is_kernel else self.implementation

  @property
  def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
    """The rate of every block, stage by stage."""
    steps = max(sum(self.depths) - 1, 1)
    rates = iter(
      self.drop_path_rate * i / steps for i in range(sum(self.depths))
    )
    return tuple(
      tuple(next(rates) for _ in range(depth)) for depth in self.depths
    )

  def dt_rank(self, dim: int) -> int:
    """R, the rank of the time-step projection in a stage of `dim` channels."""
    return math.ceil(dim / 16)


_PRESETS = {
  # Ours, for tests and small images.
  "spatial_mamba_micro": ModelConfig(
    dims=(16, 32, 64, 128), depths=(1, 1, 2, 1), num_classes=10
  ),
  "spatial_mamba_tiny": ModelConfig(
    dims=(64, 128, 256, 512), depths=(2, 4, 8, 4), drop_path_rate=0.2
  ),
  "spatial_mamba_small": ModelConfig(
    dims=(64, 128, 256, 512), depths=(2, 4, 21, 5), drop_path_rate=0.3
  ),
  "spatial_mamba_base": ModelConfig(
    dims=(96, 192, 384, 768), depths=(2, 4, 21, 5), drop_path_rate=0.5
  ),
}


def list_models() -> list[str]:
  """The names that `create_model` and `create_backbone` take."""
  return sorted(_PRESETS)


def _plain(value: Any) -> Any:
  """Python's numbers and tuples, in place of NumPy's numbers and of lists."""
  if isinstance(value, np.generic | np.ndarray):
    value = value.tolist()
  return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def get_model_config(name: str, **overrides: Any) -> ModelConfig:
  """A named architecture, with some of its fields replaced.

  Raises:
    ValueError: the name, a field or a value is wrong, or the dtype is float64
      while JAX computes in no more than float32.
  """
  if name not in list_models():
    raise UserError(
      f"no model is named {show(name)}: choose from {', '.join(list_models())}"
    )
  fields = [field.name for field in dataclasses.fields(ModelConfig)]
  for key in overrides:
    if key not in fields:
      raise UserError(
        f"{key!r} is no field of a model{suggestion(key, fields)}"
      )
  overrides = {key: _plain(value) for key, value in overrides.items()}
  config = dataclasses.replace(_PRESETS[name], **overrides)
  if jax.dtypes.canonicalize_dtype(config.dtype) != config.dtype:
    raise UserError(
      "dtype must be float32 or narrower unless JAX_ENABLE_X64=1 is in the"
      " environment, got float64"
    )
  if "dtype" in overrides:
    config = dataclasses.replace(config, dtype=jnp.dtype(config.dtype))
  return config
