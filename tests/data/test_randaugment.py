"""RandAugment against timm's."""

import math

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data import DataConfig, randaugment
from spatial_mamba_jax.data.randaugment import OPERATIONS, Operation

NAMES = (
  "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing",
  "SolarizeIncreasing", "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing",
  "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
  "TranslateXRel", "TranslateYRel",
)  # fmt: skip
UNSIGNED = ("PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd")
GREY = Image.new("RGB", (4, 4))


@pytest.fixture
def recorded(monkeypatch):
  """Records (name, argument) of operations instead of applying them."""
  log = []

  def record(name, operation):
    def apply(image, argument):
      log.append((name, argument))
      return image

    return Operation(operation.argument, apply)

  operations = {name: record(name, o) for name, o in OPERATIONS.items()}
  monkeypatch.setattr(randaugment, "OPERATIONS", operations)
  return log


def test_operations_are_timms(golden):
  expected = golden("randaugment")
  image = Image.fromarray(expected["image"])
  tried = set()
  for key, pixels in expected.items():
    name, _, argument = key.partition("/")
    if name not in ("image", "level", "level_magnitudes"):
      actual = OPERATIONS[name].apply(image, float(argument or 0))
      np.testing.assert_array_equal(np.asarray(actual), pixels, err_msg=key)
      tried.add(name)
  assert tried == set(OPERATIONS) == set(NAMES)


def test_magnitudes_are_timms(golden):
  expected = golden("randaugment")
  magnitudes = expected["level_magnitudes"]
  for name, operation in OPERATIONS.items():
    arguments = [operation.argument(m, 1) for m in magnitudes]
    levels = expected.get(f"level/{name}", np.zeros(len(magnitudes)))
    np.testing.assert_allclose(arguments, levels, rtol=1e-15, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_signs(name):
  plus, minus = (OPERATIONS[name].argument(6.0, sign) for sign in (1, -1))
  if name in UNSIGNED or not plus:
    assert plus == minus
  elif name in ("Rotate", *NAMES[-4:]):
    assert plus == -minus
  else:
    assert plus - 1 == 1 - minus > 0


def test_no_bits_kept_is_black():
  image = Image.effect_noise((8, 8), 99).convert("RGB")
  black = OPERATIONS["PosterizeIncreasing"].apply(image, 0.0)
  assert not np.asarray(black).any()


def test_the_distribution_of_draws(recorded):
  """Two of fifteen are drawn; half are applied, at N(9, 0.5) up to 10."""
  rng = np.random.default_rng(0)
  images = 6000
  for _ in range(images):
    randaugment.randaugment(GREY, DataConfig(), rng)

  def assert_share(count, of, share):
    deviation = math.sqrt(of * share * (1 - share))
    assert abs(count - of * share) < 4 * deviation

  assert_share(len(recorded), 2 * images, 1 / 2)
  for name in NAMES:
    found = [argument for applied, argument in recorded if applied == name]
    assert_share(len(found), 2 * images, 1 / 30)
  degrees = np.array([a for name, a in recorded if name == "Rotate"])
  assert_share(np.count_nonzero(degrees > 0), len(degrees), 1 / 2)
  shares = np.array([a for n, a in recorded if n[:5] in ("Shear", "Rotat")])
  magnitudes = 10 * np.abs(
    np.where(np.abs(shares) > 1, shares / 30, shares / 0.3)
  )
  # 2.3% of N(9, 0.5) are above 10 and become 10.
  assert_share(
    np.count_nonzero(magnitudes > 10 - 1e-9), len(magnitudes), 0.02275
  )
  assert_share(np.count_nonzero(magnitudes < 9), len(magnitudes), 1 / 2)
  assert_share(np.count_nonzero(magnitudes < 8.5), len(magnitudes), 0.15866)


def test_an_image_is_distorted_by_its_own_draws_alone():
  noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  image = Image.fromarray(noise)

  def augmented(seed, **settings):
    rng = np.random.default_rng(seed)
    config = DataConfig(**settings)
    return np.asarray(randaugment.randaugment(image, config, rng))

  seeds = range(8)
  first = [augmented(seed) for seed in seeds]
  for seed, pixels in zip(seeds, first, strict=True):
    np.testing.assert_array_equal(augmented(seed), pixels)
  assert len({pixels.tobytes() for pixels in first}) > 4
  np.testing.assert_array_equal(augmented(0, randaugment_operations=0), noise)


def test_the_same_operation_twice(recorded):
  rng = np.random.default_rng(0)
  config = DataConfig(randaugment_operations=40, randaugment_std=0.0)
  randaugment.randaugment(GREY, config, rng)
  names = [name for name, _ in recorded]
  assert len(names) > len(set(names))
  assert {a for name, a in recorded if name == "SolarizeAdd"} <= {99}
