"""Kernels on sharded arrays: each device computes its own images and channels.

XLA cannot partition a kernel. A `shard_map` over the current mesh
(`jax.set_mesh`) does. The name of a mesh axis says what it shards.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from spatial_mamba_kernels.typing import Array

# Names of the mesh axes that shard the batch, and of those that shard channels.
BATCH_AXES = ("replica", "data", "fsdp")
CHANNEL_AXES = ("model", "tensor")

# Kinds of dimensions of arguments and results: sharded like the batch, sharded
# like the channels, not sharded.
BATCH, CHANNELS, WHOLE = "batch", "channels", None


def split_axes(batch: int, channels: int) -> dict[str, tuple[str, ...]]:
  """Returns the axes of the current mesh that shard the batch and the channels.

  Args:
    batch: number of images on all devices.
    channels: number of channels on all devices.

  Returns:
    {BATCH: names, CHANNELS: names}; empty without a mesh.

  Raises:
    NotImplementedError: the mesh has an axis of an unknown name or type, or the
      batch or the channels do not divide evenly.
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
  """Checks that explicit mesh axes shard nothing of images but the batch.

  Args:
    x: [B, ...].

  Raises:
    NotImplementedError: they shard rows, columns or channels.
  """
  if any(axis is not None for axis in jax.typeof(x).sharding.spec[1:]):
    raise NotImplementedError(
      "images can be split over explicit mesh axes by their batch alone, not"
      f" as {jax.typeof(x)}: make the mesh with"
      " axis_types=(AxisType.Auto, ...), or reshard the images"
    )


def share_of_device(batch: int, channels: int) -> tuple[int, int]:
  """Returns the number of images and of channels on each device.

  Raises:
    NotImplementedError: see `split_axes`.
  """
  axes = split_axes(batch, channels)
  sizes = jax.sharding.get_abstract_mesh().shape
  images, channels = (
    whole // math.prod(sizes[name] for name in axes.get(kind, ()))
    for whole, kind in ((batch, BATCH), (channels, CHANNELS))
  )
  return images, channels


def check_shard_map() -> None:
  """Raises NotImplementedError within a `shard_map` with `check_vma`.

  It would check over which mesh axes values vary, which kernels do not state.
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
  """Applies a function of independent images and channels to sharded arrays.

  Args:
    function: the function on one device's shards.
    arguments: for each argument, a tuple with BATCH, CHANNELS or WHOLE for each
      of its dimensions; or a tree of these tuples.
    results: the same for the results.
    axes: the result of `split_axes`.

  Returns:
    The function of whole arrays.
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
