"""Trains a part of a network's weights, by their paths."""

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spatial_mamba_jax.errors import UserError


def freeze(
  optimizer: optax.GradientTransformation, *patterns: str
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer that leaves some weights unchanged.

      optimizer = smj.freeze(optax.adamw(1e-3), "stem.*", "stages.[01].*")
      optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

  It keeps no moments of frozen weights. BatchNorm's statistics are no weights:
  the network's mode decides whether they change.

  Args:
    optimizer: trains the other weights, which it gets as {path: array}.
    *patterns: of the paths of weights, as `fnmatch` has them, e.g.
      "stages.0.*", which matches "stages.0.blocks.1.mixer.A_log".

  Raises:
    UserError: when the optimizer is initialised: a pattern matches no weight.
  """
  inner = optax.with_extra_args_support(optimizer)

  def trained(tree: Any) -> dict[str, Any]:
    return {
      path: leaf
      for path, leaf in _leaves(tree).items()
      if not any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    }

  def init(params: Any) -> Any:
    paths = list(_leaves(params))
    for pattern in patterns:
      if not fnmatch.filter(paths, pattern):
        raise UserError(
          f"no weight has a path like {pattern}: the first is {paths[0]}"
        )
    return inner.init(trained(params))

  def update(
    updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, Any]:
    params = None if params is None else trained(params)
    changes: Any
    changes, state = inner.update(trained(updates), state, params, **extra)
    whole = [
      changes[path] if path in changes else jnp.zeros_like(leaf)
      for path, leaf in _leaves(updates).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(updates), whole), state

  return optax.GradientTransformationExtraArgs(init, update)


def _leaves(tree: Any) -> dict[str, Any]:
  """Returns {path: array} of a tree of NNX or of dictionaries, in its order."""
  return {_path(keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


def _path(keys: tuple[Any, ...]) -> str:
  # Variables of NNX end in an attribute, which belongs to no path.
  names = (getattr(key, "key", getattr(key, "idx", None)) for key in keys)
  return ".".join(str(name) for name in names if name is not None)
