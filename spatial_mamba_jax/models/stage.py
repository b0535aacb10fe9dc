"""A stage: blocks of one resolution, applied in sequence.

Axis letters: B batch, H and W height and width, C channels.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.core import Tracer
from jax.extend.backend import get_default_device
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models import fsdp
from spatial_mamba_jax.models.initializers import Streams


@runtime_checkable
class Block(Protocol):
  """The interface of a block, which is an `nnx.Module`."""

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Computes the block's output.

    Args:
      x: tokens.
      scales: factors of the two branches, from `drop_path_scales`. None drops
        no branch.
    """
    ...


# Remat policy of a block: saves what operators and large products name
# `CHECKPOINT_NAME`. The backward pass recomputes the rest (elementwise
# operations, depthwise convolutions, the thin product of the time steps),
# because saving it costs more memory traffic.
_KEEP = jax.checkpoint_policies.save_only_these_names(smk.CHECKPOINT_NAME)


class Stage(nnx.Module):
  """Blocks of one resolution.

  Attributes:
    blocks: a list of blocks; after `stack`, one block with the weights of all.
  """

  def __init__(
    self,
    create: Callable[[Hashable, nnx.Rngs], Block],
    variants: Sequence[Hashable],
    *,
    remat: bool | None,
    rngs: nnx.Rngs,
  ):
    """Creates the blocks.

    Args:
      create: (variant, rngs) -> a block.
      variants: the variant of each block; blocks of equal variants have the
        same structure.
      remat: see `ModelConfig`.
      rngs: random streams; `params` initialises the weights.
    """
    self.blocks = nnx.List(_fresh_blocks(create, variants, rngs))
    _check_state(self.blocks)
    self.is_stacked = False
    self.remat = remat
    self.deterministic = True

  def stack(self) -> None:
    """Replaces the blocks by one, if they have the same structure.

    Its weights are the blocks' weights, stacked along a new first axis. However
    deep the stage is, a program can then compile one block, and an optimizer
    updates as many arrays as one block has. Blocks of different structure stay
    unchanged.
    """
    if self.is_stacked:
      return
    alike = _alike(self.blocks)
    if alike is not None:
      graphdef, stacked = alike
      self.blocks = nnx.merge(graphdef, stacked)
      self.is_stacked = True

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "depth 2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    if self.deterministic and not self.is_stacked:
      # A scan would stack the weights first, a tenth of each call's time.
      for block in self.blocks:
        x = block(x)
      return x
    alike = nnx.split(self.blocks) if self.is_stacked else _alike(self.blocks)
    if alike is None:
      return self._one_by_one(x, scales)
    graphdef, stacked = alike
    if not self.deterministic and not self._has_remat():
      step = _with_shards_saved(partial(_step, graphdef))
      statistics = []
      for block in _unstacked((stacked, scales)):
        x, new = step(x, block)
        statistics.append(new)
      self._update(_stack_trees(statistics))
      return x
    step = partial(_step, graphdef)
    if not self.deterministic:
      step = jax.checkpoint(step, policy=_KEEP, prevent_cse=False)
    x, statistics = jax.lax.scan(step, x, (stacked, scales))
    self._update(statistics)
    return x

  def _one_by_one(self, x, scales):
    """Applies blocks of different structure, in training mode."""
    for i, block in enumerate(self.blocks):
      graphdef, state = nnx.split(block)
      step = partial(_step, graphdef)
      if self._has_remat():
        step = jax.checkpoint(step, policy=_KEEP)
      else:
        step = _with_shards_saved(step)
      x, new = step(x, (state, None if scales is None else scales[i]))
      nnx.update(block, new)
    return x

  def _update(self, statistics):
    """Updates the statistics of all blocks from stacked ones, in training."""
    if self.deterministic:
      return
    if self.is_stacked:
      nnx.update(self.blocks, statistics)
      return
    for i, block in enumerate(self.blocks):
      nnx.update(block, jax.tree.map(lambda x, i=i: x[i], statistics))

  def _has_remat(self):
    # On a GPU a scan copies what it saves for the backward pass, which would be
    # a quarter of a training step's memory traffic. On a CPU remat is faster,
    # and without it a TPU may run out of memory.
    if self.remat is None:
      return get_default_device().platform != "gpu"
    return self.remat


def _check_state(blocks: Any) -> None:
  """Refuses state that a scan over blocks would not update."""
  for path, variable in nnx.to_flat_state(nnx.state(blocks)):
    if not isinstance(variable, nnx.Param | nnx.BatchStat):
      name = ".".join(map(str, path))
      raise ValueError(
        f"blocks.{name} is neither a parameter nor a statistic of BatchNorm,"
        " and would not change in training: give random streams (rngs) to the"
        " network's call"
      )


def _with_shards_saved(step):
  """Without remat, lets the backward pass gather a block's parameters again."""
  if not fsdp.is_sharded():
    return step
  policy = jax.checkpoint_policies.save_anything_except_these_names(
    fsdp.GATHERED
  )
  return jax.checkpoint(step, policy=policy)


@partial(jax.jit, static_argnums=0)
def _step(graphdef, x, block):
  """Applies one block, as the body of `jax.lax.scan`; jitted to be traced once.

  Returns:
    The block's output, and its new BatchNorm statistics.
  """
  state, scales = block
  module = nnx.merge(graphdef, fsdp.gather(state))
  return module(x, scales), nnx.state(module, nnx.BatchStat)


def _fresh_blocks(
  create: Callable[[Hashable, nnx.Rngs], Block],
  variants: Sequence[Hashable],
  rngs: nnx.Rngs,
) -> Iterator[Block]:
  """Yields blocks with independently drawn weights."""
  keys = jax.random.split(rngs.params(), len(variants))
  if not isinstance(keys, Tracer):
    for variant, key in zip(variants, keys, strict=True):
      yield create(variant, Streams(key))
    return
  # Within `jit` one `vmap` draws the weights of all blocks. With JAX's default
  # generator they equal those of separate draws, which would take longer to
  # compile than a training step.
  drawn = {}
  for variant in dict.fromkeys(variants):
    indices = [i for i, other in enumerate(variants) if other == variant]
    drawn |= zip(indices, _draw(create, variant, keys, indices), strict=True)
  for i in range(len(variants)):
    yield drawn[i]


def _draw(create, variant, keys, indices):
  """Yields the blocks at these indices, which have this variant."""
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(variant, Streams(0))))
  if len(indices) < len(keys):
    keys = keys[jnp.array(indices)]
  stacked = jax.vmap(lambda key: nnx.state(create(variant, Streams(key))))(keys)
  # Constant indices, so that XLA removes the slices where blocks are stacked
  # again.
  for i in range(len(indices)):
    yield nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))


def _alike(blocks: Sequence[Block]) -> tuple[Any, Any] | None:
  """Returns the blocks' common graphdef, and their stacked state.

  Returns None if their structures or the shapes of their weights differ.
  """
  graphdefs, states = zip(*map(nnx.split, blocks), strict=True)
  shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in states]
  if any(x != graphdefs[0] for x in graphdefs) or shapes.count(shapes[0]) < len(
    shapes
  ):
    return None
  return graphdefs[0], _stack_trees(states)


def _stack_trees(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _unstacked(tree: Any) -> Iterator[Any]:
  """Yields a tree for each index of the arrays' first axis."""
  leaves, structure = jax.tree.flatten(tree)
  for elements in zip(*map(_unstack, leaves), strict=True):
    yield jax.tree.unflatten(structure, elements)


@jax.custom_vjp
def _unstack(x):
  # With constant indices the blocks' fusions would differ, and each would be
  # compiled separately.
  indices = [jax.lax.optimization_barrier(jnp.int32(i)) for i in range(len(x))]
  return [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for i in indices]


# JAX's own derivative would add arrays of the whole stage's size.
_unstack.defvjp(
  lambda x: (_unstack(x), None), lambda _, cotangents: (jnp.stack(cotangents),)
)
