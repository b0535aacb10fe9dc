"""Predicts label maps of images of any size, as mmsegmentation 1.2.2 does.

Axis letters: B batch, H and W height and width of a label map, h and w those
of a view (the image as the network sees it), K classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.heads.resampling import bilinear, resize
from spatial_mamba_jax.tasks.segmentation.strips import (
  Resized,
  joined,
  map_strips,
)

# (images [B, h, w, 3]) -> logits of the decode head, at a lower resolution.
Head = Callable[[Array], Array]


class Windows(NamedTuple):
  """Square windows that slide over an image.

  Attributes:
    side: height and width, in pixels; a smaller image is one window.
    stride: pixels between windows. The last one is moved back into the image.
  """

  side: int
  stride: int


def predict_views(
  head: Head,
  views: Sequence[Float[Array, "B _ _ 3"]],
  sizes: Int[Array, "B 2"],
  height: int,
  width: int,
  *,
  flip: bool = False,
  windows: Windows | None = None,
) -> Int[Array, "B H W"]:
  """Predicts the class of each pixel, from one view of the image or more.

  The logits of a view are resized to the view, and from there to the image. Of
  several views, the probabilities are averaged.

  Args:
    head: computes logits.
    views: the normalised images in several sizes.
    sizes: height and width of the label map of each image.
    height: H, at least every height in `sizes`.
    width: W, likewise.
    flip: whether the mirror image of each view is a further view.
    windows: the windows of which logits are averaged; None for whole images.

  Returns:
    The classes; anything outside of an image's size.
  """
  resized = []
  for images in views:
    for is_flipped in (False, True)[: 1 + flip]:
      seen = images[:, :, ::-1] if is_flipped else images
      logits = _view_logits(head, seen, windows)
      logits = logits[:, :, ::-1] if is_flipped else logits
      resized.append(_resized(logits, images.shape, sizes, height, width))

  def classes(strips):
    if len(strips) == 1:
      return jnp.argmax(strips[0], -1).astype(jnp.int16)
    total = sum(map(jax.nn.softmax, strips))
    return jnp.argmax(total, -1).astype(jnp.int16)

  return joined(map_strips(classes, resized), height)


def _view_logits(head, images, windows):
  if windows is None:
    return head(images)
  return slide(head, images, windows)


def slide(
  head: Head, images: Float[Array, "B h w 3"], windows: Windows
) -> Float[Array, "B h w K"]:
  """Averages the logits of windows, at the size of the view."""
  height, width = images.shape[1:3]
  rows, columns = min(windows.side, height), min(windows.side, width)
  starts = [
    (top, left)
    for top in _starts(height, windows)
    for left in _starts(width, windows)
  ]

  def logits(image):
    return resize(head(image), rows, columns)

  shape = jax.eval_shape(logits, images[:, :rows, :columns])
  total = jnp.zeros((len(images), height, width, shape.shape[-1]), shape.dtype)

  def add(total, start):
    corner = (0, *start, 0)
    size = (len(images), rows, columns, images.shape[-1])
    window = logits(jax.lax.dynamic_slice(images, corner, size))
    old = jax.lax.dynamic_slice(total, corner, window.shape)
    return jax.lax.dynamic_update_slice(total, old + window, corner), None

  total, _ = jax.lax.scan(add, total, tuple(jnp.asarray(starts).T))
  counts = np.zeros((height, width, 1))
  for top, left in starts:
    counts[top : top + rows, left : left + columns] += 1
  return total / jnp.asarray(counts, total.dtype)


def _starts(size: int, windows: Windows) -> list[int]:
  side, stride = windows
  count = max(size - side + stride - 1, 0) // stride + 1
  return [max(min(i * stride, size - side), 0) for i in range(count)]


def _resized(logits, view_shape, sizes, height, width):
  """Returns logits to be resized to a view, and from there to each image."""

  def weights(axis, new):
    old, view = logits.shape[axis], view_shape[axis]
    to_view = jnp.asarray(bilinear(old, view), logits.dtype)
    to_image = _bilinear_to(view, sizes[:, axis - 1], new, logits.dtype)
    return jnp.einsum(
      "bpv,vl->bpl", to_image, to_view, precision=jax.lax.Precision.HIGHEST
    )

  return Resized(logits, weights(1, height), weights(2, width))


def _bilinear_to(old: int, sizes: Array, most: int, dtype) -> Array:
  """Returns [B, most, old], `resampling.bilinear` to sizes on the device.

  Rows beyond a size repeat the last one's weights.

  Raises:
    UserError: products of the two sizes do not fit into int32.
  """
  if 2 * most * old >= 2**31:
    raise UserError(
      f"an image of {most} pixels a side cannot be evaluated in views of {old}:"
      " shrink the image, or lower config.task.box"
    )
  new = sizes[:, None]
  doubled = (2 * jnp.arange(most) + 1) * old - new
  doubled = jnp.clip(doubled, 0, 2 * new * (old - 1))
  left, rest = jnp.divmod(doubled, 2 * new)
  weight = (rest.astype(dtype) / (2 * new).astype(dtype))[..., None]
  cells, left = jnp.arange(old), left[..., None]
  right = jnp.minimum(left + 1, old - 1)
  return jnp.where(left == cells, 1 - weight, 0) + jnp.where(
    right == cells, weight, 0
  )
