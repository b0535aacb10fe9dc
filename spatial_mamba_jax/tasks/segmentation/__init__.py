"""A class for each pixel: UPerNet, as Spatial-Mamba's authors train it."""

from spatial_mamba_jax.tasks.segmentation.config import SegmentationConfig

__all__ = ["SegmentationConfig"]
