"""Trains a part of a network's weights, by their paths."""

import fnmatch
from typing import Any

import jax
import optax

from spatial_mamba_jax.errors import UserError


def freeze(
  optimizer: optax.GradientTransformation, *patterns: str
) -> optax.GradientTransformation:
  """Returns an optimizer that leaves some weights unchanged.

      optimizer = smj.freeze(optax.adamw(1e-3), "stem.*", "stages.[01].*")
      optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

  It keeps no moments of frozen weights. BatchNorm's statistics are no weights:
  the network's mode decides whether they change.

  Args:
    optimizer: trains the other weights.
    *patterns: of the paths of weights, as `fnmatch` has them, e.g.
      "stages.0.*", which matches "stages.0.blocks.1.mixer.A_log".

  Raises:
    UserError: when the optimizer is initialised: a pattern matches no weight.
  """

  def is_frozen(tree: Any) -> Any:
    paths = [_path(keys) for keys, _ in jax.tree.leaves_with_path(tree)]
    for pattern in patterns:
      if not fnmatch.filter(paths, pattern):
        raise UserError(
          f"no weight has a path like {pattern}: the first is {paths[0]}"
        )
    return jax.tree.map_with_path(
      lambda keys, _: any(
        fnmatch.fnmatchcase(_path(keys), pattern) for pattern in patterns
      ),
      tree,
    )

  return optax.transforms.selective_transform(optimizer, freeze_mask=is_frozen)


def _path(keys: tuple[Any, ...]) -> str:
  """Returns the path of a weight in a tree of NNX or of dictionaries."""
  names = (getattr(key, "key", getattr(key, "idx", None)) for key in keys)
  return ".".join(str(name) for name in names if name is not None)
