"""Erasing, mixup and cutmix on the device, against timm's rules in NumPy."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_mamba_jax.tasks.classification import (
  ClassificationConfig,
  MixingConfig,
)
from spatial_mamba_jax.tasks.classification.losses import smoothed_targets
from spatial_mamba_jax.tasks.classification.preprocess import (
  cutmix_box,
  erased_boxes,
  mix,
  normalise,
  prepare,
  random_erasing,
)

pytestmark = pytest.mark.usefixtures("strict")

DRAWS = 4000


def assert_same_distribution(ours, theirs):
  """Compares two samples by Kolmogorov-Smirnov at the 0.1% level."""
  ours, theirs = np.sort(np.asarray(ours)), np.sort(theirs)
  if not len(ours):
    assert not len(theirs)
    return
  places = np.concatenate((ours, theirs))
  shares = (
    np.searchsorted(sample, places, "right") / len(sample)
    for sample in (ours, theirs)
  )
  distance = np.abs(next(shares) - next(shares)).max()
  assert distance < 1.95 * math.sqrt(1 / len(ours) + 1 / len(theirs))


def assert_share(count, of, share):
  deviation = math.sqrt(of * share * (1 - share))
  assert abs(count - of * share) < 4 * deviation


def erased_by_timm(rng, height, width):
  """Draws a box by timm 0.4.12's loop: top, left, bottom, right."""
  for _ in range(10):
    area = rng.uniform(0.02, 1 / 3) * height * width
    aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if h < height and w < width:
      top = rng.integers(height - h, endpoint=True)
      left = rng.integers(width - w, endpoint=True)
      return top, left, top + h, left + w
  return 0, 0, 0, 0


@pytest.mark.parametrize(
  ("height", "width"), [(1000, 1000), (60, 200), (5, 4), (1, 1)]
)
def test_erased_boxes_are_timms(height, width):
  ours = erased_boxes(jax.random.key(0), DRAWS, height, width)
  top, left, bottom, right = map(np.asarray, ours)
  for low, high, size in ((top, bottom, height), (left, right, width)):
    assert low.min() >= 0
    assert high.max() <= size
  rng = np.random.default_rng(0)
  theirs = np.array(
    [erased_by_timm(rng, height, width) for _ in range(DRAWS)]
  ).T
  heights, widths = bottom - top, right - left
  their_heights, their_widths = theirs[2] - theirs[0], theirs[3] - theirs[1]
  assert_same_distribution(heights, their_heights)
  assert_same_distribution(widths, their_widths)
  assert_same_distribution(heights * widths, their_heights * their_widths)
  some, theirs_some = heights * widths > 0, their_heights * their_widths > 0
  assert_same_distribution(top[some], theirs[0][theirs_some])
  assert_same_distribution(left[some], theirs[1][theirs_some])
  assert_same_distribution(
    (heights / np.maximum(widths, 1))[some],
    (their_heights / np.maximum(their_widths, 1))[theirs_some],
  )


def test_erasing_fills_a_box_with_noise():
  images = jnp.full((40, 32, 32, 3), 7.0)
  erased = random_erasing(images, jax.random.key(1), 1.0)
  changed = np.asarray(erased != images)
  noise = []
  for image, of_channels in zip(np.asarray(erased), changed, strict=True):
    assert (of_channels.all(-1) == of_channels.any(-1)).all()
    rows, columns = np.nonzero(of_channels.any(-1))
    box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box[..., 0].size == len(rows)
    noise.append(box.reshape(-1))
  assert len({sample[:6].tobytes() for sample in noise}) == 40
  noise = np.concatenate(noise)
  rng = np.random.default_rng(0)
  assert_same_distribution(noise, rng.standard_normal(len(noise)))


def test_a_share_of_the_images_is_erased():
  images = jnp.full((2000, 8, 8, 3), 7.0)
  erased = random_erasing(images, jax.random.key(0), 0.25)
  changed = np.asarray(jnp.any(erased != images, axis=(1, 2, 3)))
  boxes = np.asarray(erased_boxes(jax.random.key(9), DRAWS, 8, 8))
  is_some = ((boxes[2] > boxes[0]) & (boxes[3] > boxes[1])).mean()
  assert_share(changed.sum(), 2000, 0.25 * is_some)
  assert random_erasing(images, jax.random.key(0), 0.0) is images


def mixed(settings, count=2000):
  """(share of its own that each pixel keeps, its target does) of batches.

  The images of a batch are 1 and 0, so that a mixed pixel of the first is the
  share that it keeps.
  """
  images = jnp.stack([jnp.ones((6, 5, 3)), jnp.zeros((6, 5, 3))])
  target = jnp.eye(2)
  keys = jax.random.split(jax.random.key(0), count)
  pixels, targets = jax.vmap(lambda key: mix(images, target, key, settings))(
    keys
  )
  pixels, targets = np.asarray(pixels), np.asarray(targets)
  # The second image of each batch is the complement of the first.
  np.testing.assert_allclose(pixels.sum(1), 1, rtol=1e-6)
  np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
  np.testing.assert_allclose(targets.sum(2), 1, rtol=1e-6)
  assert (pixels[..., :1] == pixels).all()
  return pixels[:, 0, :, :, 0], targets[:, 0, 0]


def test_mixup():
  pixels, lam = mixed(MixingConfig(cutmix_probability=0.0))
  np.testing.assert_allclose(
    pixels, np.broadcast_to(lam[:, None, None], pixels.shape), rtol=1e-6
  )
  rng = np.random.default_rng(0)
  assert_same_distribution(lam, rng.beta(0.8, 0.8, DRAWS))
  _, lam = mixed(MixingConfig(cutmix_probability=0.0, mixup_alpha=0.2))
  assert_same_distribution(lam, rng.beta(0.2, 0.2, DRAWS))


def cut_by_timm(rng, alpha, height, width):
  """Draws a box by timm 0.4.12's rand_bbox: top, bottom, left, right."""
  ratio = math.sqrt(1 - rng.beta(alpha, alpha))
  cut_h, cut_w = int(height * ratio), int(width * ratio)
  cy, cx = rng.integers(height), rng.integers(width)
  return (
    max(cy - cut_h // 2, 0),
    min(cy + cut_h // 2, height),
    max(cx - cut_w // 2, 0),
    min(cx + cut_w // 2, width),
  )


def test_cutmix():
  pixels, lam = mixed(MixingConfig(cutmix_probability=1.0))
  assert set(np.unique(pixels)) == {0, 1}
  np.testing.assert_allclose(pixels.mean((1, 2)), lam, rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (6, 5), (1, 1)])
def test_cutmix_boxes_are_timms(alpha, height, width):
  keys = jax.random.split(jax.random.key(0), DRAWS)
  masks, shares = jax.vmap(lambda key: cutmix_box(key, height, width, alpha))(
    keys
  )
  masks = np.asarray(masks) == 1
  np.testing.assert_allclose(1 - masks.mean((1, 2)), shares, atol=1e-6)
  rows, columns = masks.any(2), masks.any(1)
  # The changed pixels are exactly this box.
  assert (masks == rows[:, :, None] & columns[:, None]).all()
  assert np.count_nonzero(np.diff(rows, axis=1), axis=1).max() <= 2
  rng = np.random.default_rng(0)
  theirs = np.array(
    [cut_by_timm(rng, alpha, height, width) for _ in range(DRAWS)]
  ).T
  there = (theirs[1] > theirs[0]) & (theirs[3] > theirs[2])
  assert_same_distribution(rows.sum(1), (theirs[1] - theirs[0]) * there)
  assert_same_distribution(columns.sum(1), (theirs[3] - theirs[2]) * there)
  assert_same_distribution(
    np.argmax(rows, 1)[masks.any((1, 2))], theirs[0][there]
  )
  assert_same_distribution(
    np.argmax(columns, 1)[masks.any((1, 2))], theirs[2][there]
  )


def test_how_often_a_batch_is_mixed():
  pixels, _ = mixed(MixingConfig(probability=0.6, cutmix_probability=0.3))
  is_whole = (pixels == 1).all((1, 2))
  is_blended = ((pixels > 0) & (pixels < 1)).any((1, 2))
  # Some boxes of cutmix are empty, so that whole images are more than 40%.
  assert_share(is_blended.sum(), len(pixels), 0.6 * 0.7)
  assert is_whole.sum() > 0.37 * len(pixels)
  assert not (is_whole & is_blended).any()


def test_partners_are_mirrored():
  images = jnp.arange(5.0)[:, None, None, None] * jnp.ones((5, 2, 2, 3))
  target = jnp.eye(5)
  settings = MixingConfig(cutmix_probability=0.0)
  out, targets = mix(images, target, jax.random.key(3), settings)
  lam = float(targets[0, 0])
  assert 0 < lam < 1
  expected = lam * np.arange(5.0) + (1 - lam) * np.arange(5.0)[::-1]
  np.testing.assert_allclose(out[:, 0, 0, 0], expected, rtol=1e-6)
  np.testing.assert_allclose(
    targets, lam * np.eye(5) + (1 - lam) * np.eye(5)[::-1], rtol=1e-6
  )


def test_the_complete_augmentation():
  config = ClassificationConfig()
  batch = {
    "image": jnp.arange(4 * 9 * 8 * 3, dtype=jnp.uint8).reshape(4, 9, 8, 3),
    "label": jnp.asarray([1, 2, 3, 4]),
  }
  preprocess = jax.jit(partial(prepare, config=config))
  images, target = preprocess(batch, jax.random.key(0))
  assert images.shape == (4, 9, 8, 3)
  assert images.dtype == jnp.float32
  np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-6)
  again = preprocess(batch, jax.random.key(0))
  assert jax.tree.all(jax.tree.map(jnp.array_equal, (images, target), again))
  other, _ = preprocess(batch, jax.random.key(1))
  assert not jnp.array_equal(images, other)

  plain = ClassificationConfig(
    erasing_probability=0.0, mixing=MixingConfig(probability=0.0)
  )
  images, target = prepare(batch, jax.random.key(0), plain)
  assert jnp.array_equal(images, normalise(batch["image"]))
  assert jnp.array_equal(target, smoothed_targets(batch["label"], 10, 0.1))
