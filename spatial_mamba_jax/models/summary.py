"""Parameters, FLOP and activations of a network, by part."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spatial_mamba_jax.models.backbone import Backbone, Classifier, Trunk
from spatial_mamba_jax.models.flops import count_work
from spatial_mamba_jax.models.segmentor import Segmentor


class Part(NamedTuple):
  """A part of a network, or the whole.

  Attributes:
    name: path of the part in the network; empty for the whole.
    parameters: number of trained weights.
    macs: multiply-adds for one image.
    activations: see `flops.Work`, for one image.
  """

  name: str
  parameters: int
  macs: float
  activations: float


@dataclasses.dataclass(frozen=True)
class Summary:
  """What `summary` returns; `print` shows a table.

  Attributes:
    title: describes the network and its input.
    parts: the parts in the order in which they are computed.
  """

  title: str
  parts: tuple[Part, ...]

  @property
  def total(self) -> Part:
    """The whole network."""
    return Part("", *(sum(x) for x in list(zip(*self.parts, strict=True))[1:]))

  def __str__(self) -> str:
    rows = [(x.name, *_cells(x)) for x in self.parts]
    rows = [
      ("part", "parameters", "GMAC", "M activations"),
      *rows,
      ("total", *_cells(self.total)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
      "  ".join(
        [name.ljust(widths[0])]
        + [x.rjust(w) for x, w in zip(cells, widths[1:], strict=True)]
      )
      for name, *cells in rows
    ]
    return "\n".join([self.title, *lines])


def _cells(part: Part) -> tuple[str, str, str]:
  return (
    f"{part.parameters:,}",
    f"{part.macs / 1e9:.3f}",
    f"{part.activations / 1e6:.2f}",
  )


def summary(
  model: Trunk | Segmentor, image_size: int | tuple[int, int] | None = None
) -> Summary:
  """Counts parameters, multiply-adds and activations of each part.

      print(smj.summary(model))

  Nothing is computed. Multiply-adds are those of matrix products, convolutions
  and linear recurrences; see `flops.count_flops`.

  Args:
    model: from `create_model`, `create_backbone` or `create_segmentor`.
    image_size: H = W or (H, W) of the image in pixels; None for the size in
      `model.config.preprocessing`.
  """
  size = image_size or model.config.preprocessing.image_size
  height, width = (size, size) if isinstance(size, int) else size
  image = jax.ShapeDtypeStruct(
    (1, height, width, model.config.in_channels), jnp.float32
  )
  return Summary(
    f"{type(model).__name__}, {height} x {width} pixels",
    tuple(_of_segmentor(model, image))
    if isinstance(model, Segmentor)
    else tuple(_of_trunk(model, image, "")[0]),
  )


def _of_segmentor(model: Segmentor, image: Any) -> Iterator[Part]:
  parts, features = _of_trunk(model.backbone, image, "backbone.")
  yield from parts
  yield _part("decode_head", model.decode_head, features)[0]
  # Only training calls it.
  yield Part("auxiliary_head", _parameters(model.auxiliary_head), 0.0, 0.0)


def _of_trunk(
  model: Trunk, image: Any, prefix: str
) -> tuple[list[Part], list[Any]]:
  """Returns the parts, and the shapes of what a backbone returns."""
  parts, features = [], []

  def add(name, module, x):
    part, result = _part(prefix + name, module, x)
    parts.append(part)
    return result

  x = add("stem", model.stem, _cast(image, model.config.dtype))
  for i, stage in enumerate(model.stages):
    if i:
      x = add(f"downsamples.{i - 1}", model.downsamples[i - 1], x)
    x = add(f"stages.{i}", stage, x)
    if isinstance(model, Backbone) and str(i) in model.norms:
      features.append(add(f"norms.{i}", model.norms[str(i)], x))
  if isinstance(model, Classifier):
    x = add("norm", model.norm, x)
    shape = (x.shape[0], x.shape[-1])
    add("head", model.head, jax.ShapeDtypeStruct(shape, x.dtype))
  return parts, features


def _cast(image: Any, dtype: Any) -> Any:
  return jax.ShapeDtypeStruct(image.shape, dtype)


def _part(name: str, module: nnx.Module, x: Any) -> tuple[Part, Any]:
  """Counts the work of a module's call, and returns its result's shape."""
  graphdef, state = nnx.split(module)

  def call(state, x):
    function: Callable[..., Any] = nnx.merge(graphdef, state)  # type: ignore
    return function(x)

  work = count_work(call, state, x)
  part = Part(name, _parameters(module), work.flops / 2, work.activations)
  return part, jax.eval_shape(call, state, x)


def _parameters(module: nnx.Module) -> int:
  leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
  return sum(x.size for x in leaves)
