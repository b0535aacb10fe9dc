"""Parameters sharded over the mesh axis `fsdp`, gathered where they are used.

Each device holds a shard of every large parameter. A block gathers its
parameters when it runs, and the cotangents of the parameters are summed into
shards again (fully sharded data parallelism, arXiv 2304.11277).
"""

import math
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from spatial_mamba_kernels.typing import Array

T = TypeVar("T")

AXIS = "fsdp"
# Name of the gathered parameters for the policies of `jax.checkpoint`.
GATHERED = "gathered_parameters"
# Elements below which a parameter stays whole: a collective of less than 16 KiB
# takes about as long as an empty one.
_MIN_ELEMENTS = 2**12


def shard_axis(
  shape: tuple[int, ...], shards: int, *, is_stacked: bool = False
) -> int | None:
  """Returns the axis of a parameter that is sharded over `fsdp`.

  The rule: it is the largest axis that `shards` divides, the first of equals.
  A parameter of fewer than 4,096 elements stays whole.

  Args:
    shape: of the parameter.
    shards: the size of the mesh axis.
    is_stacked: whether the first axis counts blocks. It is never sharded, and
      the size of one block's part decides whether the parameter is small.

  Returns:
    The axis; None if the parameter stays whole.
  """
  first = int(is_stacked)
  if shards == 1 or math.prod(shape[first:]) < _MIN_ELEMENTS:
    return None
  axes = [i for i in range(first, len(shape)) if shape[i] % shards == 0]
  return max(axes, key=lambda i: shape[i], default=None)


def axis_spec(axis: int | None) -> PartitionSpec:
  """Returns the sharding of an array along one axis, or of a whole array."""
  if axis is None:
    return PartitionSpec()
  return PartitionSpec(*(None,) * axis, AXIS)


def shard_count(mesh: Mesh | AbstractMesh) -> int:
  """Returns the size of `fsdp`; 1 for a mesh without this axis."""
  return mesh.shape.get(AXIS, 1)


def is_sharded() -> bool:
  """Returns whether the mesh in force shards parameters.

  Only XLA's partitioner gathers parameters: explicit axes shard as their arrays
  say, and within a `shard_map` each device has what it was given.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  return shard_count(mesh) > 1 and kinds[AXIS] == AxisType.Auto


def gather(parameters: T) -> T:
  """Returns the whole arrays of parameters that are sharded by the rule.

  Args:
    parameters: a tree of arrays, not stacked.
  """
  if not is_sharded():
    return parameters
  shards = shard_count(jax.sharding.get_abstract_mesh())

  def gather_one(x: Array) -> Array:
    # Small parameters are constrained, too: otherwise XLA may shard them.
    spec = axis_spec(shard_axis(x.shape, shards))
    return checkpoint_name(_gather(spec, x), GATHERED)

  return jax.tree.map(gather_one, parameters)


def _gather(spec: PartitionSpec, x: Array) -> Array:
  # JAX's own transpose would leave the cotangent whole on every device.
  whole = jax.custom_vjp(lambda x: _constrain(x, PartitionSpec()))
  whole.defvjp(
    lambda x: (_constrain(x, PartitionSpec()), None),
    lambda _, g: (_constrain(g, spec),),
  )
  return whole(_constrain(x, spec))


def _constrain(x: Array, spec: PartitionSpec) -> Any:
  return jax.lax.with_sharding_constraint(x, spec)
