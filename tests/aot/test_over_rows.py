"""A backbone of one image whose rows eight chips share."""

import pytest

from benchmarks.tpu_static import compiled
from spatial_mamba_jax.models.presets import get_model_config

pytestmark = pytest.mark.aot

CHIPS, STATES = 8, 1
# Of a v5e, in bytes.
MEMORY = 16 * 2**30


def test_an_image_of_8192_pixels_trains_on_eight_chips():
  record = compiled(
    *("image", "--target", "v5e:2x4", "--size", 8192, "--gradients"),
    *("--optimization-level", "O0"),
  )
  assert record["argument_bytes"] + record["temporary_bytes"] < MEMORY

  # Each block's scan gathers what the tokens of a chip add and how they decay,
  # in float32; the backward pass recomputes the block.
  config = get_model_config("spatial_mamba_tiny")
  inner = [
    config.mixer.expand * dim * depth
    for dim, depth in zip(config.dims, config.depths, strict=True)
  ]
  assert list(record["collectives"]["all-gather"]) == [
    2 * sum(config.depths),
    2 * 2 * 4 * STATES * sum(inner) * (CHIPS - 1),
  ]
  # Halos: of the fusion, and of convolutions.
  assert "collective-permute" in record["collectives"]
  assert "all-to-all" not in record["collectives"]
