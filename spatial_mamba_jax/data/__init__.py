"""Batches of images: `open_source`, then one of the two pipelines.

    config = DataConfig(name="digits", image_size=32)
    source = open_source(config, "train")
    with train_batches(source, config, batch_size=100, seed=0) as batches:
      batch = next(batches)

A batch has "image", uint8 [100, 32, 32, 3], and "label", int32 [100].
"""

from typing import TYPE_CHECKING

from spatial_mamba_jax.data.config import DataConfig, DataError
from spatial_mamba_jax.data.sources import (
  LabelledSource,
  SegmentedSource,
  Source,
  open_source,
)
from spatial_mamba_jax.preprocessing import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
  from spatial_mamba_jax.data.pipeline import (
    Batch,
    Batches,
    evaluation_batches,
    train_batches,
  )

__all__ = [
  "IMAGENET_MEAN",
  "IMAGENET_STD",
  "Batch",
  "Batches",
  "DataConfig",
  "DataError",
  "LabelledSource",
  "SegmentedSource",
  "Source",
  "evaluation_batches",
  "open_source",
  "train_batches",
]


def __getattr__(name: str):
  # Imported on demand, because only the pipelines need grain and Pillow.
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from spatial_mamba_jax.data import pipeline

  return getattr(pipeline, name)
