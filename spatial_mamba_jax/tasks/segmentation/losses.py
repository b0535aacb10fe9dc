"""Cross-entropy of pixels, as mmsegmentation 1.2.2 computes it.

Axis letters: B batch, h and w height and width of a head's logits, H and W
those of the labels, K classes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from spatial_mamba_kernels.typing import Array, Float, Int

from spatial_mamba_jax.data.label_maps import IGNORED
from spatial_mamba_jax.models.heads.resampling import bilinear
from spatial_mamba_jax.tasks.segmentation.strips import Resized, map_strips

# What mmsegmentation adds to a number of pixels, against division by 0.
EPSILON = float(np.finfo(np.float32).eps)


class PixelLoss(NamedTuple):
  """The loss of one head.

  Attributes:
    value: the sum of the cross-entropies of labelled pixels, in nats, over the
      number of all pixels, ignored ones too.
    accuracy: share of the labelled pixels whose class scores highest.
  """

  value: Float[Array, ""]
  accuracy: Float[Array, ""]


def pixel_loss(
  logits: Float[Array, "B h w K"], labels: Int[Array, "B H W"]
) -> PixelLoss:
  """Resizes logits to the size of the labels, and compares them.

  Args:
    logits: of a head.
    labels: classes; `IGNORED` where there is none.
  """
  batch, height, width = labels.shape

  def weights(old, new):
    matrix = jnp.asarray(bilinear(old, new), logits.dtype)
    return jnp.broadcast_to(matrix, (batch, *matrix.shape))

  rows = weights(logits.shape[1], height)
  columns = weights(logits.shape[2], width)
  losses, hits = map_strips(_of_strip, [Resized(logits, rows, columns)], labels)
  labelled = jnp.sum(labels != IGNORED, dtype=logits.dtype)
  return PixelLoss(
    jnp.sum(losses) / (labels.size + EPSILON),
    (jnp.sum(hits) + EPSILON) / (labelled + EPSILON),
  )


def _of_strip(views, labels):
  """Returns the sum of losses, and the number of hits."""
  (logits,) = views
  labels = labels.astype(jnp.int32)
  is_labelled = labels != IGNORED
  target = jnp.where(is_labelled, labels, 0)[..., None]
  own = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - own
  highest = jnp.argmax(logits, -1).astype(jnp.int32)
  hits = jnp.sum(is_labelled & (highest == labels), dtype=logits.dtype)
  return jnp.sum(jnp.where(is_labelled, losses, 0)), hits
