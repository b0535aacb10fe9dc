"""Unreadable records are named, counted, and tolerated up to a limit."""

import dataclasses
import itertools
import logging
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data import (
  DataConfig,
  DataError,
  evaluation_batches,
  open_source,
  train_batches,
)

GREY = np.full((8, 8, 3), 99, np.uint8)


@dataclasses.dataclass(frozen=True)
class Records:
  """A source that returns or raises the given values."""

  records: tuple
  num_classes: int = 3
  classes = ("a", "b", "c")

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    record = self.records[index]
    if isinstance(record, Exception):
      raise record
    return record

  def name(self, index):
    return f"record {index}"


def with_one(record, count=12) -> Records:
  """Returns good records with this one at index 5."""
  records = [{"image": GREY, "label": i % 3} for i in range(count)]
  records[5] = record
  return Records(tuple(records))


def open_batches(split, source, config, batch_size=4):
  if split == "train":
    return train_batches(source, config, batch_size=batch_size, seed=0)
  return evaluation_batches(source, config, batch_size=batch_size)


def take_epoch(split, source, config) -> tuple[list, tuple[str, ...]]:
  """Returns three batches of 4, and the unreadable records."""
  with open_batches(split, source, config) as batches:
    return list(itertools.islice(batches, 3)), batches.unreadable


CONFIG = DataConfig(
  image_size=8, max_unreadable_share=0.1, randaugment_operations=0
)
UNREADABLE = {
  "an array of floats": ({"image": GREY / 255}, "must be uint8"),
  "grey pixels": ({"image": GREY[:, :, 0]}, "must be uint8"),
  "no pixels": ({"image": GREY[:0]}, "must be uint8"),
  "None": ({"image": None}, "must be bytes"),
  "nothing": ({}, "image"),
  "OSError": (OSError(5, "Input/output error"), "Input/output error"),
  "MemoryError": (MemoryError(), "MemoryError"),
  "OverflowError": (OverflowError("too large"), "too large"),
  "RecursionError": (RecursionError("too deep"), "too deep"),
  "several lines": (ValueError("one\n two\x1b[31m"), r"one two\\x1b\[31m"),
}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_every_kind_of_wrong_record(split, kind, caplog):
  record, reason = UNREADABLE[kind]
  if isinstance(record, dict):
    record = {"label": 1, **record}
  batches, unreadable = take_epoch(split, with_one(record), CONFIG)
  assert unreadable == ("record 5",)
  (line,) = caplog.messages
  assert re.search(f"Unreadable image record 5: .*{reason}", line)
  for batch in batches:
    assert batch["image"].dtype == np.uint8
    mask = batch.get("mask", np.ones(4, bool))
    assert not batch["image"][~mask].any()
    assert batch["image"][mask].any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_transforms_count_as_reading(tmp_path, caplog, num_workers):
  for split, place in itertools.product(("train", "val"), range(8)):
    directory = tmp_path / split / "a"
    directory.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GREY).save(directory / f"{place}.png")
  # Decoded in 256 MiB, but the rows of a crop take more than 1 GiB once they
  # have the width of an example.
  for split in ("train", "val"):
    Image.new("L", (512, 2**17)).save(tmp_path / split / "a" / "thin.png")
  config = DataConfig(
    name="image_folder",
    data_dir=str(tmp_path),
    image_size=2100,
    crop_scale=(1.0, 1.0),
    crop_ratio=(1 / 256, 1 / 256),
    randaugment_operations=0,
    max_unreadable_share=0.2,
    num_workers=num_workers,
    num_threads=1,
    prefetch=1,
  )
  source = open_source(config, "train")
  with open_batches("train", source, config, 3) as batches:
    for _ in range(3):
      next(batches)
    assert [pathlib.Path(x).name for x in batches.unreadable] == ["thin.png"]
  (line,) = caplog.messages
  assert re.search(
    r"takes [\d,]+ bytes of memory, more than 1,073,741,824", line
  )


def test_interrupts_are_not_unreadable_images():
  class Interrupted(Records):
    def __getitem__(self, index):
      raise KeyboardInterrupt

  source = Interrupted(with_one({}).records)
  with (
    open_batches("train", source, CONFIG) as batches,
    pytest.raises(KeyboardInterrupt),
  ):
    next(batches)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "validation"])
class TestHalfGarbage:
  def source(self):
    good, bad = {"image": GREY, "label": 0}, {"image": b"garbage", "label": 0}
    return Records((good, bad) * 40)

  def test_ends_in_one_line(self, split, num_workers):
    config = dataclasses.replace(CONFIG, num_workers=num_workers)
    source = self.source()
    with (
      open_batches(split, source, config) as batches,
      pytest.raises(DataError) as caught,
    ):
      list(itertools.islice(batches, 100))
    message = str(caught.value)
    assert re.match(
      r"9 of 80 images are unreadable, .*_share=0\.1 .*record \d+", message
    )
    assert "\n" not in message

  def test_is_tolerated_where_it_may_be(self, split, num_workers):
    config = dataclasses.replace(
      CONFIG, num_workers=num_workers, max_unreadable_share=0.5
    )
    source = self.source()
    with open_batches(split, source, config, 40) as batches:
      # Ten failures in a row would be common: 400 images are half garbage.
      taken = list(itertools.islice(batches, 2 if split != "train" else 20))
      assert len(batches.unreadable) == 40
    if split == "train":
      assert all(batch["image"].any(axis=(1, 2, 3)).all() for batch in taken)
    else:
      assert np.concatenate([x["mask"] for x in taken]).sum() == 40


LABELS = (3, -1, 2**40, None, "1", 1.0, np.float32(1), b"\0", np.array([1]))


@pytest.mark.parametrize("split", ["train", "validation"])
class TestLabels:
  def refuse(self, split, record, config=CONFIG, shown=None):
    with (
      open_batches(split, with_one(record), config) as batches,
      pytest.raises(DataError) as caught,
    ):
      list(itertools.islice(batches, 9))
    message = str(caught.value)
    assert message == (
      f"record 5: its label is {shown}, but labels of 3 classes are integers "
      "from 0 to 2"
    )

  @pytest.mark.parametrize("label", LABELS, ids=repr)
  def test_others_are_refused(self, split, label):
    record = {"image": GREY, "label": label}
    self.refuse(split, record, shown=repr(label))

  def test_none_is_refused(self, split):
    self.refuse(split, {"image": GREY}, shown=None)

  def test_of_an_unreadable_image_as_well(self, split):
    self.refuse(split, {"image": b"garbage", "label": 3}, shown=3)

  def test_in_workers(self, split):
    config = dataclasses.replace(CONFIG, num_workers=2)
    self.refuse(split, {"image": GREY, "label": 7}, config, shown=7)

  @pytest.mark.parametrize("label", [2, np.int64(2), np.uint8(2), np.array(2)])
  def test_any_integers_do(self, split, label):
    source = with_one({"image": GREY, "label": label})
    batches, unreadable = take_epoch(split, source, CONFIG)
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.bincount(labels).tolist() == [4, 4, 4]
    assert not unreadable


def test_a_replacement_with_a_wrong_label_is_refused():
  source = Records(({"image": b"x", "label": 0},) * 9 + ({"label": 3},))
  config = dataclasses.replace(CONFIG, max_unreadable_share=0.99)
  with (
    train_batches(source, config, batch_size=1, seed=0) as batches,
    pytest.raises(DataError, match="record 9: its label is 3"),
  ):
    next(batches)


def test_a_class_without_readable_images_is_said(tmp_path, caplog):
  for name, content in (("a", None), ("b", b"garbage")):
    directory = tmp_path / "val" / name
    directory.mkdir(parents=True)
    for i in range(2):
      path = directory / f"{i}.png"
      Image.fromarray(GREY).save(path)
      if content:
        path.write_bytes(content)
  config = DataConfig(
    name="image_folder",
    data_dir=str(tmp_path),
    image_size=8,
    max_unreadable_share=0.5,
  )
  with caplog.at_level(logging.WARNING):
    source = open_source(config, "validation")
    with evaluation_batches(source, config, batch_size=4) as batches:
      next(batches)
  first, last = caplog.messages
  assert "has no readable image" not in first
  assert last.endswith("; class b has no readable image")


def test_a_worker_that_dies_is_one_line():
  class Deadly(Records):
    def __getitem__(self, index):
      import os

      os._exit(9)

  config = dataclasses.replace(CONFIG, num_workers=1)
  source = Deadly(with_one({}).records)
  with (
    open_batches("train", source, config) as batches,
    pytest.raises(DataError, match=r"^Worker .* code 9\. .*data\.num_workers"),
  ):
    next(batches)
