"""Checks of the shapes and types that a checkpoint claims for its arrays.

They run before an array is read.
"""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.training.config import TrainingError

# Upper bound of the bytes of all arrays: a multiple of the bytes on disk, plus
# a constant. Weights hardly compress; damaged metadata can claim any size.
_MAX_EXPANSION = 100
_EXTRA_BYTES = 2**26
# Types of parameters and statistics.
_TYPES = (jnp.float32, jnp.float64, jnp.int32)


def check_size(path: pathlib.Path, saved: Any) -> None:
  """Checks that the files of a checkpoint can hold its arrays.

  Args:
    path: the checkpoint.
    saved: the metadata of its arrays.

  Raises:
    TrainingError: the arrays are too large, or of a type that is not read.
  """
  stored = sum(x.stat().st_size for x in path.rglob("*") if x.is_file())
  size = 0
  for leaf in jax.tree.leaves(saved):
    if leaf.dtype not in _TYPES:
      raise TrainingError(f"{path} has an array of type {leaf.dtype}")
    chunk = getattr(leaf.storage, "chunk_shape", None) or ()
    elements = max(math.prod(leaf.shape), math.prod(chunk))
    size += elements * leaf.dtype.itemsize
  if size > _EXTRA_BYTES + _MAX_EXPANSION * stored:
    raise TrainingError(
      f"{path} has {stored} bytes, but claims to hold arrays of {size} bytes"
    )


def check_model(where: str, saved: Any, like: Weights) -> None:
  """Checks that the weights of a checkpoint have the shapes of a model.

  Args:
    where: the name of the checkpoint in messages.
    saved: the metadata of its weights.
    like: the weights of the model, or their shapes.

  Raises:
    TrainingError: names or shapes differ.
  """
  found, wanted = _named_shapes(saved), _named_shapes(like)
  differing = [
    f"{name} is {found.get(name, 'missing')} there and"
    f" {wanted.get(name, 'missing')} here"
    for name in sorted(found.keys() | wanted.keys())
    if found.get(name) != wanted.get(name)
  ]
  if differing:
    raise TrainingError(
      f"{where} holds a model other than config.model:"
      f" {'; '.join(differing[:3])}"
    )


def on_one_device(saved: Any) -> Weights:
  """Returns the shapes of saved weights, sharded on one local device."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    Weights(**saved),
  )


def _named_shapes(tree: Any) -> dict[str, list[int]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    str(getattr(path[-1], "key", path[-1])): list(leaf.shape)
    for path, leaf in leaves
  }
