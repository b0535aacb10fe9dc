"""The config of an architecture."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.shapes import at_least_float32

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import check_fields, choice, number, show
from spatial_mamba_jax.models.mixers.base import MAX_EXPANSION, MixerConfig
from spatial_mamba_jax.models.mixers.structure_aware import StructureAwareConfig
from spatial_mamba_jax.models.stage import Block
from spatial_mamba_jax.preprocessing import IMAGENET, Preprocessing

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Most channels of a stage: more than twice the width of the vision transformer
# of 22 billion parameters (arXiv 2302.05442).
MAX_CHANNELS = 2**14
# Most blocks of all stages together: more than the 1,001 layers of the deepest
# ResNet (arXiv 1603.05027). Tracing a block takes a tenth of a second or more.
MAX_BLOCKS = 2**10
# Most classes: over 768 channels the weights of the head take 3 GiB.
MAX_CLASSES = 2**20
# Most channels of an image: hyperspectral cameras have a few hundred.
MAX_IMAGE_CHANNELS = 2**10


def _dtype_name(dtype: Any) -> str:
  """Returns a dtype's name, or "" for what is not a dtype."""
  try:
    # NumPy reads None as float64.
    return "" if dtype is None else jnp.dtype(dtype).name
  except (SyntaxError, TypeError, ValueError):
    return ""


class Family(NamedTuple):
  """The constructors of the parts of a family of networks.

  Those of the stem, the block and the downsampling also take the keyword
  arguments `config` and `rngs`.

  Attributes:
    name: the family's name in saved configs.
    stem: (dim) -> a module that maps images to tokens.
    block: (dim, variant) -> a block; see `MixerConfig.variant`.
    downsampling: (dim, dim_out) -> a module that halves height and width.
    classifier: (config, *, rngs) -> a `Classifier` of these parts.
    backbone: (config, *, out_indices, rngs) -> a `Backbone` of these parts.
  """

  name: str
  stem: Callable[..., nnx.Module]
  block: Callable[..., Block]
  downsampling: Callable[..., nnx.Module]
  classifier: Callable[..., Any]
  backbone: Callable[..., Any]


def _spatial_mamba() -> Family:
  # Imported here, because that module imports this one.
  from spatial_mamba_jax.models.spatial_mamba import SPATIAL_MAMBA

  return SPATIAL_MAMBA


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The config of an architecture.

  Attributes:
    family: constructors of the parts of the network.
    dims: channels of each stage.
    depths: blocks of each stage.
    in_channels: channels of the images.
    num_classes: classes of the head.
    mixer: the token mixer of every block.
    mlp_ratio: hidden channels of the MLP, divided by the stage's channels.
    drop_path_rate: probability of dropping a branch of the last block
      (stochastic depth). It grows linearly from 0 in the first block.
    dtype: dtype of activations. Parameters, states and statistics are float32,
      or float64 if this is float64.
    layer_implementation: implementation of depthwise convolutions, norms and
      MLPs: None for the platform's best, "xla" for no kernels. The mixer's
      implementation is in the mixer's config.
    preprocessing: what the network expects of its images.
    class_names: names of the classes, by label; empty if unknown.
    remat: whether training scans over the blocks of a stage and recomputes most
      of each block in the backward pass. This halves memory and shortens
      compilation. None: False if the default device is a GPU, else True.
  """

  family: Family = dataclasses.field(default_factory=_spatial_mamba)
  dims: tuple[int, ...] = number(least=1, most=MAX_CHANNELS)
  depths: tuple[int, ...] = number(least=1, most=MAX_BLOCKS)
  in_channels: int = number(3, least=1, most=MAX_IMAGE_CHANNELS)
  num_classes: int = number(1000, least=1, most=MAX_CLASSES)
  mixer: MixerConfig = dataclasses.field(default_factory=StructureAwareConfig)
  mlp_ratio: float = number(4.0, above=0, most=MAX_EXPANSION)
  drop_path_rate: float = number(0.0, least=0, below=1)
  dtype: Any = jnp.float32
  layer_implementation: str | None = choice(None, among=("xla",))
  remat: bool | None = None
  preprocessing: Preprocessing = IMAGENET
  class_names: tuple[str, ...] = ()

  def __post_init__(self):
    check_fields(self)
    if self.class_names and len(self.class_names) != self.num_classes:
      raise UserError(
        f"class_names must name all {self.num_classes} classes, got"
        f" {len(self.class_names)} names"
      )
    if type(self.mixer).__hash__ is None:
      raise UserError(
        f"{type(self.mixer).__name__} must be a"
        " dataclass(kw_only=True, unsafe_hash=True), as MixerConfig is"
      )
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
    """The dtype of parameters: float64 if `dtype` is float64, else float32."""
    return at_least_float32(self.dtype)

  @property
  def drop_path_rates(self) -> tuple[tuple[float, ...], ...]:
    """The drop path rate of every block, by stage."""
    steps = max(sum(self.depths) - 1, 1)
    rates = iter(
      self.drop_path_rate * i / steps for i in range(sum(self.depths))
    )
    return tuple(
      tuple(next(rates) for _ in range(depth)) for depth in self.depths
    )
