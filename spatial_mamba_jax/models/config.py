"""The architectures, as the authors' configs give them."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from spatial_mamba_kernels.by_platform import PLATFORMS
from spatial_mamba_kernels.shapes import at_least_float32


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

  dims: tuple[int, ...]
  depths: tuple[int, ...]
  num_classes: int = 1000
  d_state: int = 1
  expand: int = 2
  mlp_ratio: float = 4.0
  drop_path_rate: float = 0.0
  dtype: Any = jnp.float32
  implementation: str | None = None
  remat: bool | None = None

  def __post_init__(self):
    if not self.dims or len(self.dims) != len(self.depths):
      raise ValueError(
        "dims and depths must name the same stages, at least one: got"
        f" dims={self.dims}, depths={self.depths}"
      )
    if self.dims[0] % 2:
      raise ValueError(f"dims[0] must be even, for the stem: got {self.dims}")
    counts = (*self.dims, *self.depths, self.num_classes, self.d_state)
    if min(*counts, self.expand) < 1:
      raise ValueError(
        "dims, depths, num_classes, d_state and expand must be 1 or more: got"
        f" {self}"
      )
    if not 0 <= self.drop_path_rate < 1:
      raise ValueError(
        f"drop_path_rate must be in [0, 1), not {self.drop_path_rate}"
      )
    if not jnp.issubdtype(self.dtype, jnp.floating):
      raise ValueError(f"dtype must be floating point, not {self.dtype}")

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


def get_model_config(name: str, **overrides: Any) -> ModelConfig:
  """A named architecture, with some of its fields replaced.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  if name not in _PRESETS:
    raise ValueError(
      f"no model is named {name!r}: choose from {', '.join(list_models())}"
    )
  fields = [field.name for field in dataclasses.fields(ModelConfig)]
  for key in overrides:
    if key not in fields:
      raise ValueError(
        f"{key!r} is no field of a model: choose from {', '.join(fields)}"
      )
  for key in ("dims", "depths"):
    if key in overrides:
      overrides[key] = tuple(overrides[key])
  if "dtype" in overrides:
    overrides["dtype"] = jnp.dtype(overrides["dtype"])
  return dataclasses.replace(_PRESETS[name], **overrides)
