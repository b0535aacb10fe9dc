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
# Name of the mesh axis that shards the rows of images, and so their tokens.
ROWS_AXIS = "rows"

# Kinds of dimensions of arguments and results: sharded like the batch, like the
# channels, like the rows of an image; not sharded.
BATCH, CHANNELS, ROWS, WHOLE = "batch", "channels", "rows", None


def is_split_by_rows() -> bool:
  """Whether the current mesh shards the rows of images."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(
    name == ROWS_AXIS and kind == AxisType.Auto and mesh.shape[name] > 1
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
  )


def check_divides_rows(operator: str, size: int, least: int, what: str) -> None:
  """Raises a ValueError if the current mesh cannot shard the rows evenly.

  Args:
    operator: the operator's public name, for the message.
    size: the number of rows or tokens on all devices.
    least: the least number on a device.
    what: "rows" or "tokens".
  """
  shards = jax.sharding.get_abstract_mesh().shape[ROWS_AXIS]
  if size % shards or size // shards < least:
    raise ValueError(
      f"{operator}: the mesh axis {ROWS_AXIS!r} needs a multiple of {shards}"
      f" {what}, {least * shards} or more, not {size}"
    )


def split_axes(
  batch: int, channels: int, *, by_rows: bool = False
) -> dict[str, tuple[str, ...]]:
  """Returns the axes of the current mesh that shard the batch and the channels.

  Args:
    batch: number of images on all devices.
    channels: number of channels on all devices.
    by_rows: whether the axis that shards rows is among them.

  Returns:
    {BATCH: names, CHANNELS: names, ROWS: names}; empty without a mesh.

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
  rows: tuple[str, ...] = (ROWS_AXIS,) if by_rows else ()
  known = BATCH_AXES + CHANNEL_AXES + rows
  for name, kind in kinds.items():
    if name not in known or kind != AxisType.Auto:
      raise NotImplementedError(
        f"a kernel cannot be split over the {kind} mesh axis {name!r}: it knows"
        f" axes of AxisType.Auto called {', '.join(known)}"
      )
  if not kinds:
    return {}
  axes: dict[str, tuple[str, ...]] = {ROWS: rows}
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
    arguments: for each argument, a tuple with the kind of each dimension, such
      as BATCH; or a tree of these tuples.
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
      kind in (BATCH, CHANNELS, ROWS, WHOLE) for kind in x
    )

  return jax.shard_map(
    function,
    in_specs=jax.tree.map(spec, arguments, is_leaf=is_dimensions),
    out_specs=jax.tree.map(spec, results, is_leaf=is_dimensions),
    check_vma=False,
  )
