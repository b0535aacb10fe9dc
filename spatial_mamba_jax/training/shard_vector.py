"""Each device's shards of many arrays as one vector.

An optimizer's elementwise arithmetic over one vector compiles in a third of the
time that it takes array by array. To make one vector of sharded arrays, XLA
would gather them; so each device makes a vector of its own shards.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models import fsdp
from spatial_mamba_jax.models.pure import Arrays, is_stacked

_WHOLE = PartitionSpec()


def sharded_axis(name: str, shape: tuple[int, ...], shards: int) -> int | None:
  """Returns the axis of a parameter of a `PureModel` that is sharded."""
  return fsdp.shard_axis(shape, shards, is_stacked=is_stacked(name))


def vector_spec(x: Any) -> PartitionSpec:
  """Returns the sharding of an array of the optimizer: a vector or a scalar."""
  return PartitionSpec(fsdp.AXIS) if x.ndim else _WHOLE


@dataclasses.dataclass(frozen=True)
class ShardVector:
  """How arrays that are sharded over `fsdp` become one vector on each device.

  A device's vector has its shards of the sharded arrays, then the whole arrays,
  both in the order of their names. The vectors of the devices along `fsdp`, one
  after the other, are one array, sharded over `fsdp`.

  Attributes:
    shapes: {name: shape and dtype} of the arrays.
    shards: the size of `fsdp`.
    mesh: the devices; needed where there is more than one shard, except by
      `shape` and `moved`.
  """

  shapes: Mapping[str, Any]
  shards: int = 1
  mesh: Mesh | None = None

  @classmethod
  def on(cls, mesh: Mesh | None, shapes: Mapping[str, Any]) -> "ShardVector":
    """The vector on the devices of a mesh, or on one device."""
    return cls(shapes, fsdp.shard_count(mesh) if mesh else 1, mesh)

  @property
  def shape(self) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the vectors of all devices."""
    return jax.eval_shape(self._vector, dict(self.shapes))

  @property
  def axes(self) -> dict[str, int | None]:
    """{name: the axis that is sharded}."""
    return {
      name: sharded_axis(name, x.shape, self.shards)
      for name, x in self.shapes.items()
    }

  @property
  def specs(self) -> dict[str, PartitionSpec]:
    """{name: the array's sharding}."""
    return {name: fsdp.axis_spec(axis) for name, axis in self.axes.items()}

  def norm(self, arrays: Arrays) -> Float[Array, ""]:
    """Returns the global norm of the arrays."""
    if self.shards == 1:
      return optax.tree.norm(ravel_pytree(arrays)[0])

    def of_device(arrays):
      sharded, whole = (
        jnp.sum(jnp.square(ravel_pytree(group)[0]))
        for group in self._groups(arrays)
      )
      return jnp.sqrt(jax.lax.psum(sharded, fsdp.AXIS) + whole)

    return self._on_each_device(of_device, (self.specs,), _WHOLE)(arrays)

  def transform(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """Applies an elementwise transformation to the vectors of arrays."""
    flat = optax.flatten(inner)

    def init(params):
      del params
      return inner.init(jnp.zeros(self.shape.shape, self.shape.dtype))

    def of_device(updates, state, extra):
      groups: Any = self._groups(updates)
      groups, state = flat.update(groups, state, **extra)
      return groups[0] | groups[1], state

    def update(updates, state, params=None, **extra):
      del params
      if self.shards == 1:
        return of_device(updates, state, extra)
      state_specs = jax.tree.map(vector_spec, state)
      run = self._on_each_device(
        of_device,
        (self.specs, state_specs, _WHOLE),
        (self.specs, state_specs),
      )
      return run(updates, state, extra)

    return optax.GradientTransformationExtraArgs(init, update)

  def moved(self, vector: Float[Array, "P"], to: "ShardVector") -> Array:
    """Returns the vector of the same arrays for another number of shards."""
    zeros = {n: jnp.zeros(x.shape, x.dtype) for n, x in self.shapes.items()}
    _, unravel = ravel_pytree(self._groups(self._shards_of(zeros, 0)))
    of_devices = [
      sharded | whole
      for sharded, whole in map(unravel, jnp.split(vector, self.shards))
    ]
    arrays = {
      name: of_devices[0][name]
      if axis is None
      else jnp.concatenate([shards[name] for shards in of_devices], axis)
      for name, axis in self.axes.items()
    }
    return to._vector(arrays)

  def _vector(self, arrays: Arrays) -> Float[Array, "P"]:
    """The vectors of all devices, one after the other."""
    return jnp.concatenate(
      [
        ravel_pytree(self._groups(self._shards_of(arrays, device)))[0]
        for device in range(self.shards)
      ]
    )

  def _shards_of(self, arrays: Arrays, device: int) -> Arrays:
    """The arrays that the device at an index along `fsdp` holds."""

    def shard(name, axis):
      if axis is None:
        return arrays[name]
      return jnp.split(arrays[name], self.shards, axis)[device]

    return {name: shard(name, axis) for name, axis in self.axes.items()}

  def _groups(self, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The arrays that are sharded, and those that are whole."""
    axes = self.axes
    return (
      {name: x for name, x in arrays.items() if axes[name] is not None},
      {name: x for name, x in arrays.items() if axes[name] is None},
    )

  def _on_each_device(
    self, function: Callable[..., Any], arguments: Any, results: Any
  ) -> Callable[..., Any]:
    return jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=arguments,
      out_specs=results,
      check_vma=False,
    )
