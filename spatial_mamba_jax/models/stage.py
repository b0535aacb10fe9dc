"""Blocks of one resolution, one after the other.

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


@runtime_checkable
class Block(Protocol):
  """A block, an `nnx.Module`."""

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """The block's output.

    `scales` are those of `drop_path_scales`; without, no branch is dropped.
    """
    ...


# What a block's backward pass finds: the results of large products, and what
# the operators keep by the same name. The rest it makes again, because keeping
# it costs more memory traffic: elementwise work, depthwise convolutions and the
# thin product that makes time steps.
_KEEP = jax.checkpoint_policies.save_only_these_names(smk.CHECKPOINT_NAME)


class Stage(nnx.Module):
  """Blocks of one resolution.

  Attributes:
    blocks: a list of them; or one, which holds the weights of all (`stack`).
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
      variants: of each block; blocks of equal variants are alike.
      remat: see `ModelConfig`.
      rngs: the stream `params`.
    """
    self.blocks = nnx.List(_fresh_blocks(create, variants, rngs))
    self.is_stacked = False
    self.remat = remat
    self.deterministic = True

  def stack(self) -> None:
    """Puts one block in the place of all, where they are alike.

    Its weights are those of all blocks, stacked along a new first axis. A
    program may then have one block, however deep the stage is, and an optimizer
    as many arrays. Blocks that are unlike remain as they are.
    """
    if self.is_stacked:
      return
    states = _alike(self.blocks)
    if states is not None:
      graphdef, stacked = states
      self.blocks = nnx.merge(graphdef, stacked)
      self.is_stacked = True

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "depth 2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    if self.deterministic and not self.is_stacked:
      # Weights would have to be stacked, which costs a tenth of each call.
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
    """Trains blocks that are unlike."""
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
    """Keeps the new statistics of all blocks, stacked."""
    if self.deterministic:
      return
    if self.is_stacked:
      nnx.update(self.blocks, statistics)
      return
    for i, block in enumerate(self.blocks):
      nnx.update(block, jax.tree.map(lambda x, i=i: x[i], statistics))

  def _has_remat(self):
    # What a loop keeps for the backward pass a GPU does not compute in place:
    # copies of it would be a quarter of a training step's memory traffic. On a
    # CPU remat is faster, and a TPU may have no memory for more.
    if self.remat is None:
      return get_default_device().platform != "gpu"
    return self.remat


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
  """One of a stage's blocks, as `jax.lax.scan` takes it; traced once.

  Returns:
    Its output, and its new BatchNorm statistics.
  """
  state, scales = block
  module = nnx.merge(graphdef, fsdp.gather(state))
  return module(x, scales), nnx.state(module, nnx.BatchStat)


def _fresh_blocks(
  create: Callable[[Hashable, nnx.Rngs], Block],
  variants: Sequence[Hashable],
  rngs: nnx.Rngs,
) -> Iterator[Block]:
  """Blocks with weights of their own."""
  keys = jax.random.split(rngs.params(), len(variants))
  if not isinstance(keys, Tracer):
    for variant, key in zip(variants, keys, strict=True):
      yield create(variant, nnx.Rngs(key))
    return
  # The same weights (of JAX's default generator), drawn at once: with draws of
  # each block a program would take longer to compile than a training step.
  drawn = {}
  for variant in dict.fromkeys(variants):
    indices = [i for i, other in enumerate(variants) if other == variant]
    drawn |= zip(indices, _draw(create, variant, keys, indices), strict=True)
  for i in range(len(variants)):
    yield drawn[i]


def _draw(create, variant, keys, indices):
  """The blocks of one variant, by their indices."""
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(variant, nnx.Rngs(0))))
  if len(indices) < len(keys):
    keys = keys[jnp.array(indices)]
  stacked = jax.vmap(lambda key: nnx.state(create(variant, nnx.Rngs(key))))(
    keys
  )
  # By constant indices, so that XLA undoes it where blocks are stacked again.
  for i in range(len(indices)):
    yield nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))


def _alike(blocks: Sequence[Block]) -> tuple[Any, Any] | None:
  """What the blocks have in common, and their weights along a new axis.

  None where their structures or the shapes of their weights differ.
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
  """The same tree of each element along the first axis of its arrays."""
  leaves, structure = jax.tree.flatten(tree)
  for elements in zip(*map(_unstack, leaves), strict=True):
    yield jax.tree.unflatten(structure, elements)


@jax.custom_vjp
def _unstack(x):
  # Constant indices would make each block's fusions different, to be compiled
  # apart.
  indices = [jax.lax.optimization_barrier(jnp.int32(i)) for i in range(len(x))]
  return [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for i in indices]


# JAX's derivative would add up arrays of the whole stage.
_unstack.defvjp(
  lambda x: (_unstack(x), None), lambda _, cotangents: (jnp.stack(cotangents),)
)
