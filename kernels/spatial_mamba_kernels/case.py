"""What tests, benchmarks and ahead-of-time compilation know of an operator."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spatial_mamba_kernels.dispatch import Arrays, Operator
from spatial_mamba_kernels.typing import Array


class Sizes(NamedTuple):
  """Sizes of a mixer's images; they determine the shapes of all arguments."""

  batch: int
  height: int
  width: int
  channels: int
  states: int = 1

  @property
  def image(self) -> tuple[int, int, int]:
    """[B, H, W]."""
    return self.batch, self.height, self.width


def unchanged(x: Array) -> Array:
  """Returns its argument."""
  return x


class Argument(NamedTuple):
  """The distribution of a random argument of an operator.

  Attributes:
    shape: the array's shape.
    dtype: the array's type.
    of_normal: maps standard normal samples to the array.
  """

  shape: tuple[int, ...]
  dtype: Any = jnp.float32
  of_normal: Callable[[Array], Array] = unchanged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """An operator, its arguments, and facts about its kernels.

  Attributes:
    operator: the operator, which gives the case its name.
    function: (**arrays, implementation=) -> result.
    arguments: (sizes, dtype of images, **options) -> {name: argument}, in the
      order of the operator's arrays.
    reference: (**arrays) -> result, by JAX's own functions or step by step.
    rivals: {name: (**arrays) -> result}, forms without a kernel that benchmarks
      time. Benchmarks compare values with those of the last one.
    gpu_kernels: number of kernels of the forward and of the backward pass on a
      GPU with a TMA, at the sizes of tiny's first stage.
    older_gpu_kernels: the same on a GPU without a TMA, if it differs.
    is_for_every_gpu: whether the kernels serve every GPU, and float32.
    loop_tokens: (arrays) -> {name of a GPU kernel: tokens of 128 channels per
      iteration of its loop}.
    tpu_row: (sizes) -> tokens per row of the TPU kernels.
    roundings: how often the XLA form rounds a value to bfloat16.
  """

  operator: Operator
  function: Callable[..., Any]
  arguments: Callable[..., dict[str, Argument]]
  reference: Callable[..., Any]
  rivals: Mapping[str, Callable[..., Any]]
  gpu_kernels: tuple[int, int]
  older_gpu_kernels: tuple[int, int] | None = None
  is_for_every_gpu: bool = True
  loop_tokens: Callable[[Arrays], dict[str, int]]
  tpu_row: Callable[[Sizes], int] = lambda sizes: sizes.width
  roundings: int = 4

  @property
  def name(self) -> str:
    """The operator's name."""
    return self.operator.name

  def shapes(
    self, sizes: Sizes, dtype: Any, **options: Any
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and type of each argument."""
    arguments = self.arguments(sizes, dtype, **options)
    return {
      name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype))
      for name, x in arguments.items()
    }

  def draw(
    self,
    normal: Callable[[tuple[int, ...]], Array],
    sizes: Sizes,
    dtype: Any,
    **options: Any,
  ) -> dict[str, Array]:
    """Returns random arguments.

    Args:
      normal: shape -> standard normal numbers.
      sizes: see `Sizes`.
      dtype: of images.
      **options: of `arguments`.
    """
    arguments = self.arguments(sizes, dtype, **options)
    return {
      name: x.of_normal(normal(x.shape)).astype(x.dtype)
      for name, x in arguments.items()
    }


def of_bfloat16(scale: float = 1.0) -> Callable[[Array], Array]:
  """Returns a function that scales an array and rounds it to bfloat16."""
  return lambda x: (scale * x).astype(jnp.bfloat16)


def dropped(x: Array) -> Array:
  """Returns branch scales, every second of which is 0."""
  return jnp.where(jnp.arange(len(x)) % 2 == 0, 0.5 + jnp.abs(x), 0)


def per_channel(x: Array) -> Array:
  """Reshapes [C] to [1, 1, 1, C]."""
  return x[None, None, None]
