"""One label an image: the authors' recipe for ImageNet, and its evaluation."""

from spatial_mamba_jax.tasks.classification.config import (
  ClassificationConfig,
  MixingConfig,
)

__all__ = ["ClassificationConfig", "MixingConfig"]
