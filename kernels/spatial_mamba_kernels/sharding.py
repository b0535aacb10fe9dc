"""Kernels on sharded arrays: a device computes its own images and channels.

XLA cannot split a kernel by itself. A `shard_map` over the mesh in force
(`jax.set_mesh`) does, whose axes are told apart by their customary names.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from spatial_mamba_kernels.typing import Array

BATCH_AXES = ("replica", "data", "fsdp")
CHANNEL_AXES = ("model", "tensor")

# What a dimension of an argument or result is: split as the batch is, as the
# channels are, or not at all.
BATCH, CHANNELS, WHOLE = "batch", "channels", None


def split_axes(batch: int, channels: int) -> dict[str, tuple[str, ...]]:
  """The axes of the mesh in force that split the batch and the channels.

  Args:
    batch: images in all.
    channels: channels in all.

  Returns:
    {BATCH: names, CHANNELS: names}; nothing where no mesh is in force.

  Raises:
    NotImplementedError: the mesh has an axis that means nothing here, or that
      does not split evenly.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = {
    name: kind
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind != AxisType.Manual and mesh.shape[name] > 1
  }
  for name, kind in kinds.items():
    if name not in BATCH_AXES + CHANNEL_AXES or kind != AxisType.Auto:
      raise NotImplementedError(
        f"a kernel cannot be split over the {kind} mesh axis {name!r}: it knows"
        f" axes of AxisType.Auto called {', '.join(BATCH_AXES + CHANNEL_AXES)}"
      )
  if not kinds:
    return {}
  axes = {}
  for kind, names, size in (
    (BATCH, BATCH_AXES, batch),
    (CHANNELS, CHANNEL_AXES, channels),
  ):
    axes[kind] = tuple(name for name in names if name in kinds)
    shards = math.prod(mesh.shape[name] for name in axes[kind])
    if size % shards:
      raise NotImplementedError(
        f"a kernel over the mesh {dict(mesh.shape)} needs a multiple of"
        f" {shards} for its {kind}, not {size}"
      )
  return axes


def check_only_batch_is_split(x: Array) -> None:
  """Raises where explicit mesh axes split more of images than their batch.

  Args:
    x: [B, ...].

  Raises:
    NotImplementedError: they split rows, columns or channels.
  """
  if any(axis is not None for axis in jax.typeof(x).sharding.spec[1:]):
    raise NotImplementedError(
      "images can be split over explicit mesh axes by their batch alone, not"
      f" as {jax.typeof(x)}: make the mesh with"
      " axis_types=(AxisType.Auto, ...), or reshard the images"
    )


def share_of_device(batch: int, channels: int) -> tuple[int, int]:
  """How many of them the mesh in force gives to each device.

  Raises:
    NotImplementedError: as by `split_axes`.
  """
  axes = split_axes(batch, channels)
  sizes = jax.sharding.get_abstract_mesh().shape
  images, channels = (
    whole // math.prod(sizes[name] for name in axes.get(kind, ()))
    for whole, kind in ((batch, BATCH), (channels, CHANNELS))
  )
  return images, channels


def check_shard_map() -> None:
  """Raises NotImplementedError within a `shard_map` that kernels cannot be in.

  It is one that checks how values vary, which kernels do not say.
  """
  axes = jax.sharding.get_abstract_mesh().manual_axes
  if not axes:
    return
  # Only where it is checked does a type say over which axes values vary.
  index = jax.lax.axis_index(axes[0])
  if jax.typeof(index) != jax.typeof(jnp.zeros((), index.dtype)):
    raise NotImplementedError(
      "a kernel needs check_vma=False of the shard_map that it is in"
    )


def per_shard(
  function: Callable[..., Any],
  arguments: Any,
  results: Any,
  axes: dict[str, tuple[str, ...]],
) -> Callable[..., Any]:
  """Wraps a function that computes images and channels independently.

  Args:
    function: what one device computes.
    arguments: for each argument a tuple with BATCH, CHANNELS or WHOLE for each
      of its dimensions; any tree of them.
    results: the same of what it returns.
    axes: what `split_axes` says.

  Returns:
    The function over whole arrays.
  """
  if not axes:
    return function

  def spec(dimensions):
    return PartitionSpec(*(axes.get(kind) or None for kind in dimensions))

  def is_dimensions(x):
    return isinstance(x, tuple) and all(
      kind in (BATCH, CHANNELS, WHOLE) for kind in x
    )

  return jax.shard_map(
    function,
    in_specs=jax.tree.map(spec, arguments, is_leaf=is_dimensions),
    out_specs=jax.tree.map(spec, results, is_leaf=is_dimensions),
    check_vma=False,
  )
