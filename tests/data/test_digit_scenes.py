"""The embedded scenes of digits."""

import pickle

import numpy as np
import pytest

from spatial_mamba_jax.data import DataConfig, open_source
from spatial_mamba_jax.data.digit_images import load_digits, split_indices
from spatial_mamba_jax.data.label_maps import read_label_map
from spatial_mamba_jax.data.sources import SegmentedSource


def open_scenes(split):
  source = open_source(DataConfig(name="digit_scenes"), split)
  assert isinstance(source, SegmentedSource)
  return source


@pytest.mark.parametrize(
  ("split", "count", "sizes"),
  [("train", 12_000, 1), ("validation", 100, 2)],
)
def test_scenes(split, count, sizes):
  source = open_scenes(split)
  assert len(source) == count
  assert source.num_classes == len(source.classes) == len(source.palette) == 11
  assert source.classes[:3] == ("ground", "0", "1")
  assert len({source.image_size(i) for i in range(count)}) == sizes
  pixels = np.zeros(11, int)
  for i in range(60):
    record = source[i]
    size = source.image_size(i)
    labels = read_label_map(record, 11, size)
    assert record["image"].shape == (*size, 3)
    assert record["image"].dtype == np.uint8
    pixels += np.bincount(labels.ravel(), minlength=11)
    assert 0.5 < np.mean(labels == 0) < 0.97
  assert (pixels > 0.005 * pixels.sum()).all()


def test_digits_stand_out():
  source = open_scenes("train")
  for i in range(20):
    record = source[i]
    brightness = record["image"].mean(-1)
    ground = record["labels"] == 0
    for label in np.unique(record["labels"][~ground]):
      digit = brightness[record["labels"] == label]
      assert np.mean(digit - brightness[ground].mean() > 60) > 0.9


def test_scenes_are_reproducible_and_differ():
  one, other = (
    open_scenes("train"),
    pickle.loads(pickle.dumps(open_scenes("train"))),
  )
  for name in ("image", "labels"):
    np.testing.assert_array_equal(one[5][name], other[5][name])
  assert (one[5]["image"] != one[6]["image"]).any()
  assert (one[0]["image"] != open_scenes("validation")[0]["image"]).any()
  assert one.name(5) == "train[5]"


def test_the_splits_have_no_digit_in_common():
  train, validation = map(split_indices, ("train", "validation"))
  count = len(load_digits().labels)
  assert sorted([*train, *validation]) == list(range(count))
