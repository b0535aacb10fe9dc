"""Spatial-Mamba (arXiv 2410.15091): the classifier and the backbone.

Numerically the authors' PyTorch model (`classification/models` of
github.com/EdwardChasel/Spatial-Mamba), without its CUDA extensions.

Axis letters: B batch, H and W height and width, C channels, K classes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
from flax import nnx
from jax.core import Tracer
from jax.extend.backend import get_default_device
from jax.typing import ArrayLike
from spatial_mamba_kernels.activations import relu
from spatial_mamba_kernels.shapes import with_rank_of
from spatial_mamba_kernels.sharding import check_only_batch_is_split
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.models.config import ModelConfig, get_model_config
from spatial_mamba_jax.models.layers import (
  DepthwiseConv,
  Mlp,
  conv3x3,
  drop_path_scales,
  linear,
  uniform_linear,
)
from spatial_mamba_jax.models.norms import BatchNorm, LayerNorm
from spatial_mamba_jax.models.ssm import States, StructureAwareSSM


class ConvNorm(nnx.Module):
  """A convolution (or a pointwise one) and its batch normalisation.

  In inference the weights are scaled and not what they make, so that a GPU's
  convolution adds the bias and rectifies as it writes.
  """

  def __init__(self, conv: nnx.Conv | nnx.Linear, features: int, **kwargs):
    self.conv = conv
    self.norm = BatchNorm(features, **kwargs)

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo Co"]:
    if not self.norm.use_running_average:
      return self.norm(self.conv(x))
    scale, bias = self.norm.affine()
    conv = nnx.clone(self.conv)
    conv.kernel[...] *= with_rank_of(conv.kernel[...], scale)
    if conv.bias is not None:
      conv.bias[...] = conv.bias * scale + bias
      return conv(x)
    y = conv(x)
    return y + with_rank_of(y, bias.astype(y.dtype))


class Stem(nnx.Module):
  """Images to tokens of 4 x 4 pixels, by overlapping convolutions."""

  def __init__(self, dim: int, *, config: ModelConfig, rngs: nnx.Rngs):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    half, wide = dim // 2, 4 * dim

    def conv_norm(features_in, features_out, stride):
      conv = conv3x3(features_in, features_out, stride=stride, **kwargs)
      return ConvNorm(conv, features_out, **kwargs)

    self.conv1 = conv_norm(3, half, 2)
    self.conv2 = nnx.List([conv_norm(half, half, 1), conv_norm(half, half, 1)])
    project = uniform_linear(wide, dim, use_bias=False, **kwargs)
    self.conv3 = nnx.List(
      [
        conv_norm(half, wide, 2),
        ConvNorm(project, dim, **kwargs),
      ]
    )

  def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B Ho Wo C"]:
    x = jax.nn.relu(self.conv1(x))
    x = x + self.conv2[1](jax.nn.relu(self.conv2[0](x)))
    return self.conv3[1](jax.nn.relu(self.conv3[0](x)))


class DownSampling(nnx.Module):
  """Halves height and width, by a depthwise convolution at 4 times dim_out."""

  def __init__(
    self, dim: int, dim_out: int, *, config: ModelConfig, rngs: nnx.Rngs
  ):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    wide = 4 * dim_out
    self.expand = uniform_linear(dim, wide, **kwargs)
    implementation = config.implementation_of_rest
    self.conv = DepthwiseConv(
      wide, stride=2, implementation=implementation, **kwargs
    )
    self.project = ConvNorm(
      uniform_linear(wide, dim_out, **kwargs), dim_out, **kwargs
    )

  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B Ho Wo Co"]:
    # Its bias is added where it is rectified.
    expand = self.expand
    assert expand.bias is not None
    x = x @ expand.kernel.astype(x.dtype)
    return self.project(relu(self.conv.of_relu(x, expand.bias[...])))


class Block(nnx.Module):
  """Mixer and MLP, each behind a depthwise convolution and a LayerNorm."""

  def __init__(self, dim: int, *, config: ModelConfig, rngs: nnx.Rngs):
    kwargs = {"dtype": config.dtype, "rngs": rngs}
    kwargs["implementation"] = config.implementation_of_rest
    self.conv1 = DepthwiseConv(dim, **kwargs)
    self.norm1 = LayerNorm(dim, **kwargs)
    self.mixer = StructureAwareSSM(dim, config=config, rngs=rngs)
    self.conv2 = DepthwiseConv(dim, **kwargs)
    self.norm2 = LayerNorm(dim, **kwargs)
    self.mlp = Mlp(dim, int(config.mlp_ratio * dim), **kwargs)

  def __call__(
    self,
    x: Float[Array, "B H W C"],
    scales: Float[Array, "2 B"] | None = None,
  ) -> Float[Array, "B H W C"]:
    """Without `scales` (`drop_path_scales`), no branch is dropped."""
    first, second = (None, None) if scales is None else scales
    x, branch = self.norm1.residual(self.conv1.residual(x))
    x = x + self.mixer(branch, first)
    x, branch = self.norm2.residual(self.conv2.residual(x))
    return self.mlp(branch, x, second)

  def states(self, x: Float[Array, "B H W C"]) -> States:
    """The states of the mixer in `self(x)`."""
    return self.mixer.states(self.norm1(self.conv1.residual(x)))


# What a block's backward pass finds: the results of large products, and what
# the operators keep by the same name. The rest it makes again, because keeping
# it costs more memory traffic: elementwise work, depthwise convolutions and the
# thin product that makes time steps.
_KEEP = jax.checkpoint_policies.save_only_these_names(smk.CHECKPOINT_NAME)


class Stage(nnx.Module):
  """Blocks of one resolution.

  Attributes:
    blocks: one after the other; or only the first, see `stack`.
  """

  def __init__(
    self,
    dim: int,
    depth: int,
    *,
    config: ModelConfig,
    rngs: nnx.Rngs,
  ):
    create = partial(Block, dim, config=config)
    self.blocks = nnx.List(_fresh_blocks(create, depth, rngs))
    self.is_stacked = False
    self.remat = config.remat
    self.deterministic = True

  def stack(self) -> None:
    """Keeps of the blocks the first, to hold the weights of all of them.

    They lie along an axis before each weight's own. A program may then have
    one block, however deep the stage is, and an optimizer as many arrays.
    """
    if not self.is_stacked:
      graphdef, stacked = _stacked(self.blocks)
      self.blocks = nnx.List([nnx.merge(graphdef, stacked)])
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
    graphdef, stacked = (
      nnx.split(self.blocks[0]) if self.is_stacked else _stacked(self.blocks)
    )
    step = partial(_step, graphdef)
    if not self.deterministic:
      if not self._has_remat():
        for block in _unstacked((stacked, scales)):
          x, _ = step(x, block)
        return x
      step = jax.checkpoint(step, policy=_KEEP, prevent_cse=False)
    x, _ = jax.lax.scan(step, x, (stacked, scales))
    return x

  def _has_remat(self):
    # What a loop keeps for the backward pass a GPU does not compute in place:
    # copies of it would be a quarter of a training step's memory traffic. On a
    # CPU remat is faster, and a TPU may have no memory for more.
    if self.remat is None:
      return get_default_device().platform != "gpu"
    return self.remat


@partial(jax.jit, static_argnums=0)
def _step(graphdef, x, block):
  """One of a stage's blocks, as `jax.lax.scan` takes it; traced once."""
  parameters, scales = block
  return nnx.merge(graphdef, parameters)(x, scales), None


def _fresh_blocks(
  create: Callable[..., Block], depth: int, rngs: nnx.Rngs
) -> Iterator[Block]:
  """Equal blocks, with weights of their own."""
  keys = jax.random.split(rngs.params(), depth)
  if not isinstance(keys, Tracer):
    for key in keys:
      yield create(rngs=nnx.Rngs(key))
    return
  # The same weights (of JAX's default generator), drawn at once: with draws of
  # each block a program would take longer to compile than a training step.
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))
  stacked = jax.vmap(lambda key: nnx.state(create(rngs=nnx.Rngs(key))))(keys)
  # By constant indices, so that XLA undoes it where blocks are stacked again.
  for i in range(depth):
    yield nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))


def _stacked(blocks: Sequence[Block]) -> tuple[Any, Any]:
  """What the blocks have in common, and their weights along a new axis."""
  graphdefs, parameters = zip(*map(nnx.split, blocks), strict=True)
  return graphdefs[0], jax.tree.map(lambda *x: jnp.stack(x), *parameters)


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


class Trunk(nnx.Module):
  """Stem, stages and the downsampling between them."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    dims = config.dims
    self.config = config
    self.stem = Stem(dims[0], config=config, rngs=rngs)
    self.stages = nnx.List(
      [
        Stage(dim, depth, config=config, rngs=rngs)
        for dim, depth in zip(dims, config.depths, strict=True)
      ]
    )
    self.downsamples = nnx.List(
      [
        DownSampling(dim, dim_out, config=config, rngs=rngs)
        for dim, dim_out in itertools.pairwise(dims)
      ]
    )
    self.deterministic = True

  def _stage_features(
    self, images: ArrayLike, rngs: nnx.Rngs | None
  ) -> Iterator[Float[Array, "B H W C"]]:
    """The tokens that leave each stage, before they are downsampled."""
    x = self.stem(check_images(images).astype(self.config.dtype))
    scales = self._drop_path_scales(rngs, x.shape[0])
    for i, stage in enumerate(self.stages):
      if i > 0:
        x = self.downsamples[i - 1](x)
      x = stage(x, scales[i])
      yield x

  def _drop_path_scales(self, rngs, batch):
    """What each stage takes."""
    depths = self.config.depths
    if self.deterministic or not self.config.drop_path_rate:
      return [None] * len(depths)
    if rngs is None:
      raise ValueError(
        "training with drop path is random: call model(images,"
        " rngs=nnx.Rngs(drop_path=key)), or model.eval() first"
      )
    rates = list(itertools.chain(*self.config.drop_path_rates))
    scales = drop_path_scales(rngs.drop_path(), rates, batch)
    return jnp.split(scales, list(itertools.accumulate(depths[:-1])))


class SpatialMamba(Trunk):
  """The image classifier.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    dtype = config.param_dtype
    self.norm = LayerNorm(config.dims[-1], dtype=dtype, rngs=rngs)
    self.head = linear(
      config.dims[-1], config.num_classes, dtype=dtype, rngs=rngs
    )

  def __call__(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> Float[Array, "B K"]:
    """Classifies images of any height and width.

    Args:
      images: [B, H, W, 3], floating point, normalised by ImageNet's mean and
        standard deviation.
      rngs: the stream `drop_path`, needed in training mode where
        `drop_path_rate` is not 0.

    Returns:
      Logits [B, K], float32 (float64 where the model's dtype is).

    Raises:
      ValueError: `images` has another shape or type, or `rngs` is missing.
    """
    *_, x = self._stage_features(images, rngs)
    return self.head(jnp.mean(self.norm(x), axis=(1, 2)))


class SpatialMambaBackbone(Trunk):
  """Feature maps for detection, segmentation and other dense tasks.

  For forward-mode derivatives see `spatial_mamba_kernels`.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    out_indices: Sequence[int] = (0, 1, 2, 3),
    rngs: nnx.Rngs,
  ):
    super().__init__(config, rngs=rngs)
    stages = range(len(config.dims))
    if not out_indices or not set(out_indices) <= set(stages):
      raise ValueError(
        f"out_indices must be some of the stages {tuple(stages)}, not"
        f" {tuple(out_indices)}"
      )
    self.norms = nnx.Dict(
      {
        str(i): LayerNorm(config.dims[i], dtype=config.dtype, rngs=rngs)
        for i in out_indices
      }
    )

  def __call__(
    self, images: ArrayLike, *, rngs: nnx.Rngs | None = None
  ) -> list[Float[Array, "B Hi Wi Ci"]]:
    """Feature maps of images of any height and width.

    Args:
      images: as for `SpatialMamba`.
      rngs: as for `SpatialMamba`.

    Returns:
      For each of the model's `out_indices`, in rising order, the normalised
      features [B, H / (4 * 2**i), W / (4 * 2**i), dims[i]] (rounded up).

    Raises:
      ValueError: as for `SpatialMamba`.
    """
    return [
      self.norms[str(i)](x)
      for i, x in enumerate(self._stage_features(images, rngs))
      if str(i) in self.norms
    ]


def create_model(
  name: str, *, rngs: nnx.Rngs, **overrides: Any
) -> SpatialMamba:
  """Creates a classifier with the authors' initialisation, in eval mode.

      model = create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
      logits = model(images)

  Args:
    name: one of `list_models()`.
    rngs: the stream `params`.
    **overrides: fields of `ModelConfig` to replace, e.g. num_classes=10.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  return SpatialMamba(get_model_config(name, **overrides), rngs=rngs)


def create_backbone(
  name: str,
  *,
  out_indices: Sequence[int] = (0, 1, 2, 3),
  rngs: nnx.Rngs,
  **overrides: Any,
) -> SpatialMambaBackbone:
  """Creates a backbone for dense tasks, in eval mode.

  Args:
    name: one of `list_models()`.
    out_indices: the stages whose features are returned.
    rngs: the stream `params`.
    **overrides: fields of `ModelConfig` to replace.

  Raises:
    ValueError: the name, a field or a value is wrong.
  """
  config = get_model_config(name, **overrides)
  return SpatialMambaBackbone(config, out_indices=out_indices, rngs=rngs)


def check_images(images: ArrayLike) -> Array:
  """The images as an array; a ValueError where they cannot be."""
  array = jnp.asarray(images)
  if array.ndim != 4 or array.shape[-1] != 3 or not array.size:
    raise ValueError(
      f"images must have shape [B, H, W, 3], not {list(array.shape)}"
    )
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise ValueError(
      f"images must be floating point and normalised, not {array.dtype}"
    )
  check_only_batch_is_split(array)
  return array
