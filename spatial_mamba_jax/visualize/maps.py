"""Maps over an image that show what a network looks at.

Axis letters: B batch, H and W height and width, h and w those of a block's
tokens, D channels, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax import theory
from spatial_mamba_jax.models.backbone import Trunk, stage_features
from spatial_mamba_jax.models.mixers import LinearMixer
from spatial_mamba_jax.models.states import block_states, mixer_input


def receptive_field(
  model: Trunk, images: Float[Array, "B H W I"]
) -> Float[np.ndarray, "H W"]:
  """Returns the effective receptive field of the last stage's centre token.

  The field is the gradient of the sum of the token's positive features by each
  pixel, as in "Scaling Up Your Kernels to 31x31" (arXiv 2203.06717). Absolute
  values are summed over colours and averaged over images. The field is divided
  by its greatest value.

  Args:
    model: from `create_model` or `create_backbone`, in eval mode.
    images: normalised. They are taken one by one, to save memory.
  """
  total = sum(np.asarray(_gradient(model, image)) for image in images)
  return np.asarray(total / np.max(total))


@nnx.jit
def _gradient(model, image):
  def centre(image):
    x = stage_features(model, image[None])[-1]
    token = x[0, x.shape[1] // 2, x.shape[2] // 2]
    return jnp.sum(jax.nn.relu(token.astype(jnp.float32)))

  return jnp.sum(jnp.abs(jax.grad(centre)(image)), axis=-1)


class StateMaps(NamedTuple):
  """States of one image before and after fusion.

  Attributes:
    mean: [2, h, w], means of absolute values over channels: before, after.
    single: [2, T, h, w], T single states.
    places: (channel, state) of each of these.
  """

  mean: Float[np.ndarray, "2 h w"]
  single: Float[np.ndarray, "2 T h w"]
  places: tuple[tuple[int, int], ...]


def state_maps(
  model: Trunk,
  image: Float[Array, "H W I"],
  *,
  stage: int,
  block: int,
  count: int = 3,
) -> StateMaps:
  """Returns a block's states before and after fusion; see `block_states`.

  Args:
    model: from `create_model` or `create_backbone`, in eval mode.
    image: normalised.
    stage: index of the stage, from 0.
    block: index of the block in its stage, from 0.
    count: T, the number of single states: those that vary most along the rows
      of the image, before fusion.

  Raises:
    ValueError: there is no such block, or its mixer has no states.
  """
  states = nnx.jit(block_states, static_argnums=(2, 3))(
    model, image[None], stage, block
  )
  _, height, width, *channels = states.before.shape
  before, after = (
    np.asarray(x, np.float32).reshape(height, width, -1) for x in states
  )
  both = np.moveaxis(np.stack((before, after)), -1, 1)
  varied = np.argsort(-before.std(axis=1).mean(axis=0))[:count]
  return StateMaps(
    np.abs(both).mean(axis=1),
    both[:, varied],
    tuple((int(d), int(n)) for d, n in np.argwhere(np.ones(channels))[varied]),
  )


def mixing_maps(
  model: Trunk,
  image: Float[Array, "H W I"],
  positions: Sequence[tuple[float, float]],
  *,
  stage: int,
  block: int,
) -> tuple[list[tuple[int, int]], Float[np.ndarray, "T h w"]]:
  """Returns rows of a block's mixing matrix as images; see `theory`.

  Args:
    model: from `create_model` or `create_backbone`, in eval mode.
    image: normalised.
    positions: of T output tokens, row and column as shares of the image.
    stage: index of the stage, from 0.
    block: index of the block in its stage, from 0.

  Returns:
    Row and column of each output token, and for each of them the absolute
    weight of every token in it, averaged over channels.

  Raises:
    ValueError: there is no such block, it has one token only, or its mixer has
      no matrix.
  """

  @nnx.jit
  def rows(model, image, token):
    mixer, x = mixer_input(model, image[None], stage, block)
    if not isinstance(mixer, LinearMixer):
      raise ValueError(
        f"a {type(mixer).__name__} has no mixing matrix: it is not linear in"
        " any values"
      )
    row = theory.mixing_rows(mixer.mix, *mixer.select(x), token[None])
    return jnp.mean(jnp.abs(row[0, 0].astype(jnp.float32)), axis=-1)

  height, width = jax.eval_shape(rows, model, image, jnp.zeros((), int)).shape
  if height * width == 1:
    raise ValueError(
      f"stage {stage} has one token for an image of {image.shape[0]} x"
      f" {image.shape[1]} pixels: choose an earlier stage, or a larger image"
    )
  tokens = [
    (min(int(row * height), height - 1), min(int(column * width), width - 1))
    for row, column in positions
  ]
  # One after the other, because the gradients of a large image are large.
  maps = [
    np.asarray(rows(model, image, jnp.asarray(row * width + column)))
    for row, column in tokens
  ]
  return tokens, np.stack(maps)
