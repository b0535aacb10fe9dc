"""Synthetic images."""

import numpy as np

from spatial_mamba_jax.data import DataConfig, open_source


def test_is_as_large_as_configured_and_always_the_same():
  config = DataConfig(
    name="synthetic", image_size=24, synthetic_images=7, synthetic_classes=3
  )
  source = open_source(config, "train")
  assert len(source) == 7
  assert source.num_classes == 3
  assert [source[i]["label"] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
  assert source[5]["image"].shape == (24, 24, 3)
  assert source[5]["image"].dtype == np.uint8
  again = open_source(config, "train")
  np.testing.assert_array_equal(source[5]["image"], again[5]["image"])
  for other in (source[4], open_source(config, "validation")[5]):
    assert (source[5]["image"] != other["image"]).any()
  assert source.name(5) != source.name(4)
