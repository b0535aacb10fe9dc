"""Losses and targets. Axis letters: B batch, K classes."""

import jax
import jax.numpy as jnp
from spatial_mamba_kernels.typing import Array, Float, Int


def soft_cross_entropy(
  logits: Float[Array, "B K"], target: Float[Array, "B K"]
) -> Float[Array, " B"]:
  """Returns the cross-entropy against a distribution over classes, in nats."""
  return -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)


def smoothed_targets(
  labels: Int[Array, " B"], num_classes: int, smoothing: float
) -> Float[Array, "B K"]:
  """Returns one-hot labels with the share `smoothing` spread over classes."""
  off = smoothing / num_classes
  return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + off
