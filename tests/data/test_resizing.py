"""Resizing, against OpenCV's."""

import pathlib

import numpy as np
import pytest

from spatial_mamba_jax.data.resizing import (
  Window,
  rescaled_size,
  resize_image,
  resize_labels,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "segmentation"
AUGMENT = dict(np.load(GOLDEN / "augment.npz"))


def test_sizes_equal_the_original():
  for width, height, _, *box, new_width, new_height in AUGMENT["rescale"]:
    size, box = (int(height), int(width)), (int(box[0]), int(box[1]))
    assert rescaled_size(size, box) == (new_height, new_width)
    assert rescaled_size(size[::-1], box[::-1]) == (new_width, new_height)


def test_no_side_vanishes():
  assert rescaled_size((1, 5000), (64, 32)) == (1, 64)


@pytest.mark.parametrize(
  ("name", "box"), [("up", (64, 31)), ("down", (64, 13))]
)
def test_pixels_equal_the_original(name, box):
  image, labels = AUGMENT["img"], AUGMENT["label"]
  size = rescaled_size(labels.shape, box)
  np.testing.assert_array_equal(
    resize_image(image, size), AUGMENT[f"{name}_img"]
  )
  np.testing.assert_array_equal(
    resize_labels(labels, size), AUGMENT[f"{name}_label"]
  )


@pytest.mark.parametrize("size", [(24, 40), (71, 113), (9, 17), (24, 20)])
def test_a_window_is_a_part_of_the_whole(size):
  image, labels = AUGMENT["img"], AUGMENT["label"]
  whole = resize_image(image, size), resize_labels(labels, size)
  rng = np.random.default_rng(0)
  for _ in range(30):
    top, left = (int(rng.integers(side)) for side in size)
    window = Window(
      *(top, left),
      int(rng.integers(1, size[0] - top + 1)),
      int(rng.integers(1, size[1] - left + 1)),
    )
    part = (
      resize_image(image, size, window),
      resize_labels(labels, size, window),
    )
    rows = slice(top, top + window.height)
    columns = slice(left, left + window.width)
    for one, other in zip(part, whole, strict=True):
      np.testing.assert_array_equal(one, other[rows, columns])


def test_the_same_size_changes_nothing():
  image, labels = AUGMENT["img"], AUGMENT["label"]
  np.testing.assert_array_equal(resize_image(image, labels.shape), image)
  np.testing.assert_array_equal(resize_labels(labels, labels.shape), labels)


def test_images_of_one_pixel():
  pixel = np.array([[[7, 100, 255]]], np.uint8)
  grown = resize_image(pixel, (5, 3))
  assert (grown == pixel).all()
  assert grown.shape == (5, 3, 3)
  assert resize_image(AUGMENT["img"], (1, 1)).shape == (1, 1, 3)
  assert (resize_labels(np.array([[-1]], np.int16), (4, 2)) == -1).all()


def test_labels_keep_their_type_and_values():
  labels = np.arange(-1, 299, dtype=np.int16).reshape(15, 20)
  resized = resize_labels(labels, (40, 33))
  assert resized.dtype == np.int16
  assert set(resized.ravel()) == set(labels.ravel())
