"""Kernels on sharded arrays: a device computes its own images and channels.

XLA cannot split a kernel by itself. A `shard_map` over the mesh in force
(`jax.set_mesh`) does, whose axes are told apart by their customary names.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("replica", "data", "fsdp")
CHANNEL_AXES = ("model", "tensor")

# What a dimension of an argument or result is: split as the batch is, as the
# channels are, or not at all.
BATCH, CHANNELS, WHOLE = "batch", "channels", None


def per_shard(
  function: Callable[..., Any],
  arguments: Any,
  results: Any,
  *,
  batch: int,
  channels: int,
) -> Callable[..., Any]:
  """Wraps a function that computes images and channels independently.

  Args:
    function: what one device computes.
    arguments: for each argument a tuple with BATCH, CHANNELS or WHOLE for each
      of its dimensions; any tree of them.
    results: the same of what it returns.
    batch: images in all.
    channels: channels in all.

  Returns:
    The function over whole arrays; itself where no mesh is in force.

  Raises:
    NotImplementedError: the batch or the channels cannot be split evenly.
  """
  mesh = jax.sharding.get_abstract_mesh()
  open_axes = [
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind != AxisType.Manual and mesh.shape[name] > 1
  ]
  if not open_axes:
    return function
  axes = {}
  for kind, names, size in (
    (BATCH, BATCH_AXES, batch),
    (CHANNELS, CHANNEL_AXES, channels),
  ):
    axes[kind] = tuple(name for name in names if name in open_axes)
    shards = math.prod(mesh.shape[name] for name in axes[kind])
    if size % shards:
      raise NotImplementedError(
        f"a kernel over the mesh {dict(mesh.shape)} needs a multiple of"
        f" {shards} for its {kind}, not {size}"
      )

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
