"""Photometric distortion, against mmsegmentation's."""

import pathlib

import numpy as np
import pytest

from spatial_mamba_jax.data.photometric import (
  distort,
  draw_distortion,
  hsv_to_rgb,
  rgb_to_hsv,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "segmentation"
AUGMENT = dict(np.load(GOLDEN / "augment.npz"))
CASES = [x[4:-5] for x in AUGMENT if x.endswith("_ints")]


def rgb(name: str) -> np.ndarray:
  return AUGMENT[name][..., ::-1]


class Scripted(np.random.Generator):
  """Returns the golden's draws, in their order."""

  def __init__(self, ints, uniforms):
    super().__init__(np.random.PCG64(0))
    self.ints, self.uniforms = ints.tolist(), uniforms.tolist()

  def random(self):
    return 0.25 if self.ints.pop(0) else 0.75

  def integers(self, low, high=None):
    low, high = (0, low) if high is None else (low, high)
    value = self.ints.pop(0)
    assert low <= value < high
    return value

  def uniform(self, low, high):
    value = self.uniforms.pop(0)
    assert low <= value < high
    return value


@pytest.mark.parametrize("case", CASES)
def test_equals_the_original(case):
  rng = Scripted(AUGMENT[f"pmd_{case}_ints"], AUGMENT[f"pmd_{case}_uniforms"])
  image = rgb("img")
  before = image.copy()
  distorted = distort(image, draw_distortion(rng, 0.5))
  assert not rng.ints
  assert not rng.uniforms
  assert distorted.dtype == np.uint8
  # Beyond whole vectors of 32 pixels, OpenCV rounds to RGB instead.
  np.testing.assert_array_equal(distorted[:, :32], rgb(f"pmd_{case}")[:, :32])
  np.testing.assert_array_equal(image, before)


def test_hsv_equals_opencv():
  hsv = np.stack(rgb_to_hsv(rgb("hsv_bgr")), -1)
  np.testing.assert_array_equal(hsv, AUGMENT["hsv"])
  pixels = hsv_to_rgb(*np.moveaxis(AUGMENT["bgr_hsv"], -1, 0))
  np.testing.assert_array_equal(pixels, rgb("bgr"))


def test_hsv_of_every_hue_and_grey():
  grey = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, -1, 3)
  hue, saturation, value = rgb_to_hsv(grey)
  assert not hue.any()
  assert not saturation.any()
  assert value.ravel().tolist() == list(range(256))
  hues = np.arange(180)[None]
  full = np.full_like(hues, 255)
  again, *_ = rgb_to_hsv(hsv_to_rgb(hues, full, full))
  np.testing.assert_array_equal(again, hues)


STEPS = ("brightness", "contrast", "saturation", "hue")


def test_draws_are_in_range():
  rng = np.random.default_rng(0)
  drawn = [draw_distortion(rng, 1.0) for _ in range(400)]
  ranges = ((-32, 32), (0.5, 1.5), (0.5, 1.5), (-18, 17))
  for name, (low, high) in zip(STEPS, ranges, strict=True):
    values = [getattr(x, name) for x in drawn]
    margin = (high - low) / 20
    assert low <= min(values) < low + margin
    assert high - margin < max(values) <= high
  assert abs(sum(x.contrast_first for x in drawn) - 200) < 40


@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_the_probability_is_of_each_step(probability):
  rng = np.random.default_rng(0)
  drawn = [draw_distortion(rng, probability) for _ in range(1000)]
  for name in STEPS:
    count = sum(getattr(x, name) is not None for x in drawn)
    assert abs(count - 1000 * probability) <= 200 * probability  # 4 deviations.
