"""The pipeline: order, resuming, processes and workers."""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

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


def numbered(count: int, **settings) -> tuple:
  """Synthetic images whose label is their index."""
  config = DataConfig(
    name="synthetic",
    image_size=8,
    synthetic_images=count,
    synthetic_classes=count,
    **settings,
  )
  return open_source(config, "train"), config


def take(source, config, count, **arguments) -> list:
  with train_batches(source, config, **arguments) as batches:
    return list(itertools.islice(batches, count))


def labels_of(batches) -> list[int]:
  return np.concatenate([batch["label"] for batch in batches]).tolist()


def assert_same_batches(actual, expected):
  assert len(actual) == len(expected)
  for one, other in zip(actual, expected, strict=True):
    assert one.keys() == other.keys()
    for name in one:
      np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture
def tree(image_tree, tmp_path):
  return shutil.copytree(image_tree, tmp_path / "tree")


def open_tree(root, split="train", **settings) -> tuple:
  config = DataConfig(
    name="image_folder", data_dir=str(root), image_size=16, **settings
  )
  return open_source(config, split), config


# The whole image at its own size, so that only the flip changes it.
UNCHANGED = {
  "crop_scale": (1.0, 1.0),
  "crop_ratio": (1.0, 1.0),
  "randaugment_operations": 0,
}


class TestTrainBatches:
  def test_contents(self, image_tree):
    source, config = open_tree(image_tree)
    (batch,) = take(source, config, 1, batch_size=5, seed=0)
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (5, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (5,)
    assert batch["label"].dtype == np.int32

  def test_an_epoch_is_every_image_once_in_a_new_order(self):
    source, config = numbered(30)
    labels = labels_of(take(source, config, 9, batch_size=10, seed=0))
    epochs = [labels[:30], labels[30:60], labels[60:]]
    for epoch in epochs:
      assert sorted(epoch) == list(range(30))
      assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]

  def test_images_keep_their_labels(self):
    source, config = numbered(6, **UNCHANGED, flip_probability=0.0)
    for batch in take(source, config, 3, batch_size=4, seed=0):
      for image, label in zip(batch["image"], batch["label"], strict=True):
        np.testing.assert_array_equal(image, source[int(label)]["image"])

  def test_images_change_from_epoch_to_epoch(self):
    source, config = numbered(6)
    first, second = take(source, config, 2, batch_size=6, seed=0)
    order = [np.argsort(batch["label"]) for batch in (first, second)]
    same = first["image"][order[0]] == second["image"][order[1]]
    assert not same.all(axis=(1, 2, 3)).any()

  def test_flips_half_of_the_images(self):
    source, config = numbered(400, **UNCHANGED)
    (batch,) = take(source, config, 1, batch_size=400, seed=0)
    flipped = 0
    for image, label in zip(batch["image"], batch["label"], strict=True):
      original = source[int(label)]["image"]
      is_flipped = (image == original[:, ::-1]).all()
      assert is_flipped or (image == original).all()
      flipped += is_flipped
    assert abs(flipped - 200) < 3 * 10  # Three binomial deviations.

  def test_the_seed_decides(self):
    source, config = numbered(30)
    batches = [
      take(source, config, 2, batch_size=10, seed=seed) for seed in (0, 0, 1)
    ]
    assert_same_batches(batches[0], batches[1])
    assert labels_of(batches[0]) != labels_of(batches[2])

  def test_resuming_and_workers_change_nothing(self, image_tree):
    # 12 images in batches of 5: batches reach over the ends of epochs.
    arguments = {"batch_size": 5, "seed": 3}
    source, config = open_tree(image_tree)
    expected = take(source, config, 9, **arguments)
    for num_workers, num_threads, start_step in (
      *((0, 1, 0), (0, 4, 4)),
      *((2, 2, 4), (3, 1, 1)),
    ):
      config.num_workers, config.num_threads = num_workers, num_threads
      actual = take(
        source, config, 9 - start_step, start_step=start_step, **arguments
      )
      assert_same_batches(actual, expected[start_step:])

  def test_processes_read_rows_of_the_same_batches(self, image_tree):
    # 12 images in batches of 5; one process has rows that lie apart.
    arguments = {"batch_size": 5, "seed": 3}
    source, config = open_tree(image_tree)
    expected = take(source, config, 5, start_step=2, **arguments)
    # Starting workers takes seconds.
    for rows, config.num_workers in (
      *(([0, 3], 0), ([1], 0), ([2, 4], 0)),
      ([0, 3], 2),
    ):
      part = take(source, config, 5, start_step=2, rows=rows, **arguments)
      assert_same_batches(
        part,
        [{name: x[rows] for name, x in batch.items()} for batch in expected],
      )

  def test_batches_of_one(self):
    source, config = numbered(3)
    batches = take(source, config, 3, batch_size=1, seed=0)
    assert sorted(labels_of(batches)) == [0, 1, 2]

  def test_batches_larger_than_the_source(self):
    source, config = numbered(3)
    (batch,) = take(source, config, 1, batch_size=7, seed=0)
    assert np.bincount(batch["label"][:6]).tolist() == [2, 2, 2]


class TestEvaluationBatches:
  @pytest.mark.parametrize(
    ("num_workers", "processes", "batch_size"),
    [
      *itertools.product([0], [1, 3], [3, 12, 24, 60]),
      *((3, 1, 10), (2, 2, 12)),
    ],
  )
  def test_counts_every_image_once(self, num_workers, processes, batch_size):
    source, config = numbered(23, num_workers=num_workers)
    seen = []
    for first in range(processes):
      rows = range(first, batch_size, processes)
      with evaluation_batches(
        source, config, batch_size=batch_size, rows=rows
      ) as batches:
        taken = list(batches)
      assert len(taken) == -(-23 // batch_size)  # No more than needed.
      for number, batch in enumerate(taken):
        assert batch["image"].shape == (len(rows), 8, 8, 3)
        assert batch["mask"].dtype == np.bool_
        assert not batch["image"][~batch["mask"]].any()
        seen += batch["label"][batch["mask"]].tolist()
        assert batch["index"].tolist() == [
          number * batch_size + i for i in rows
        ]
        # Labels are indices here; padding has the indices after the last.
        is_image = batch["index"] < 23
        np.testing.assert_array_equal(is_image, batch["mask"])
        np.testing.assert_array_equal(
          np.where(is_image, batch["index"], 0), batch["label"]
        )
    assert sorted(seen) == list(range(23))

  def test_contents(self, image_tree):
    source, config = open_tree(image_tree, "validation", test_crop_ratio=1.0)
    with evaluation_batches(source, config, batch_size=9) as batches:
      (batch,) = batches
    assert batch.keys() == {"image", "index", "label", "mask"}
    assert batch["index"].dtype == np.int32
    assert batch["index"].tolist() == list(range(9))
    assert batch["label"].dtype == np.int32
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert batch["mask"].all()
    for i, image in enumerate(batch["image"]):
      with Image.open(source.name(i)) as file:
        rgb = file.convert("RGB")
      short = min(rgb.size)
      size = tuple(int(16 * side / short) for side in rgb.size)
      resized = rgb.resize(size, Image.Resampling.BICUBIC)
      left, top = (round((side - 16) / 2) for side in size)
      expected = resized.crop((left, top, left + 16, top + 16))
      np.testing.assert_array_equal(image, np.asarray(expected))

  def test_can_be_left_early_and_asked_again(self):
    source, config = numbered(23)
    with evaluation_batches(source, config, batch_size=4) as batches:
      next(batches)
    with evaluation_batches(source, config, batch_size=12) as batches:
      assert len(list(batches)) == 2
      assert list(batches) == []


class TestUnreadableImages:
  REASONS = (
    ("missing", "No such file"),
    ("empty", "empty file"),
    ("truncated", "(?i)truncated"),
    ("not an image", "not an image"),
    ("bomb", "decompression bomb"),
  )

  @pytest.mark.parametrize(("kind", "reason"), REASONS)
  def test_evaluation_masks_and_names_them(
    self, tree, break_image, caplog, kind, reason
  ):
    source, config = open_tree(tree, "validation", max_unreadable_share=0.2)
    name = source.name(4)
    break_image(tree / name, kind)
    with evaluation_batches(source, config, batch_size=5) as batches:
      taken = list(batches)
      assert batches.unreadable == (name,)
    mask = np.concatenate([batch["mask"] for batch in taken])
    assert mask.tolist() == [True] * 4 + [False] + [True] * 4 + [False]
    (record,) = caplog.records
    assert name in record.message
    assert re.search(reason, record.message)

  def test_training_replaces_them_whatever_the_workers(
    self, tree, break_image, caplog
  ):
    source, config = open_tree(tree, max_unreadable_share=0.5)
    broken = [source.name(i) for i in range(5)]
    for name, (kind, _) in zip(broken, self.REASONS, strict=True):
      break_image(tree / name, kind)
    arguments = {"batch_size": 4, "seed": 0}
    taken = []
    for config.num_workers in (0, 2):
      caplog.clear()
      with train_batches(source, config, **arguments) as batches:
        taken.append(list(itertools.islice(batches, 6)))
        assert sorted(batches.unreadable) == broken
      assert len(caplog.records) == 5  # Each once, though met twice.
    assert_same_batches(*taken)
    for batch in taken[0]:
      assert (batch["image"].max(axis=(1, 2, 3)) > 0).all()
    config.num_workers = 0
    resumed = take(source, config, 3, start_step=3, **arguments)
    assert_same_batches(resumed, taken[0][3:])

  @pytest.mark.parametrize("split", ["train", "validation"])
  @pytest.mark.parametrize("num_workers", [0, 1])
  def test_too_many_end_in_one_line(
    self, tree, break_image, split, num_workers
  ):
    source, config = open_tree(
      tree, split, max_unreadable_share=0.12, num_workers=num_workers
    )
    for i in (1, 3):  # One of 9 or 12 is tolerated, two are not.
      break_image(tree / source.name(i), "truncated")
    if split == "train":
      batches = train_batches(source, config, batch_size=3, seed=0)
    else:
      batches = evaluation_batches(source, config, batch_size=3)
    with batches, pytest.raises(DataError) as caught:
      list(itertools.islice(batches, 8))
    message = str(caught.value)
    assert f"2 of {len(source)} images are unreadable" in message
    assert "data.max_unreadable_share=0.12" in message
    assert source.name(1) in message
    assert source.name(3) in message
    assert "\n" not in message

  @pytest.mark.parametrize("num_workers", [0, 1])
  def test_nothing_is_readable(self, tree, break_image, num_workers):
    source, config = open_tree(
      tree, max_unreadable_share=0.99, num_workers=num_workers
    )
    for path in tree.glob("train/*/*"):
      break_image(path, "empty")
    with (
      train_batches(source, config, batch_size=3, seed=0) as batches,
      pytest.raises(DataError, match="JPEG is unreadable, and so were 10"),
    ):
      next(batches)

  def test_warnings_of_pillow_are_no_errors(self, tree):
    # pytest makes errors of warnings, as `python -W error` does.
    source, config = open_tree(tree)
    image = Image.new("P", (20, 20))
    for i in range(len(source)):
      image.save(source.name(i), "PNG", transparency=bytes([7, 0]))
    with train_batches(source, config, batch_size=3, seed=0) as batches:
      next(batches)
      assert not batches.unreadable


# Prints a line when the workers run, then waits for the end.
FOREVER = """
import signal
import time
from spatial_mamba_jax.data import *

def main():
  # A shell's background jobs, and so their tests, ignore SIGINT.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  config = DataConfig(
    name="synthetic", image_size=8, num_workers=2, synthetic_images=10
  )
  source = open_source(config, "train")
  with train_batches(source, config, batch_size=5, seed=0) as batches:
    next(batches), next(batches)
    print("running", flush=True)
    while True:
      time.sleep(0.1)

if __name__ == "__main__":
  main()
"""


class TestWorkers:
  @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
  def test_end_with_the_block(self, error):
    source, config = numbered(20, num_workers=2)

    def run():
      with train_batches(source, config, batch_size=4, seed=0) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        raise error

    with pytest.raises(error):
      run()
    assert not multiprocessing.active_children()

  def test_outlive_a_request_to_stop(self):
    # A cluster sends it to all processes, and the main one wants to save first.
    source, config = numbered(20, num_workers=2)
    with train_batches(source, config, batch_size=4, seed=0) as batches:
      next(batches), next(batches)
      workers = multiprocessing.active_children()
      for worker in workers:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
          os.kill(worker.pid, number)
      for _ in range(4 * config.num_workers * config.prefetch):
        next(batches)
      assert all(worker.is_alive() for worker in workers)

  @pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGKILL, "main"), (signal.SIGINT, "group")]
  )
  def test_end_with_the_main_process(self, tmp_path, number, whom):
    script = tmp_path / "forever.py"
    script.write_text(FOREVER)
    run = subprocess.Popen(
      [sys.executable, str(script)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "running\n"
    if whom == "group":
      os.killpg(run.pid, number)
    else:
      run.send_signal(number)
    # The pipes close when the last process has gone, the workers among them.
    _, errors = run.communicate(timeout=600)
    assert run.returncode == -number
    assert errors.count("Traceback") == (whom == "group")

  def test_leave_the_accelerator_alone(self):
    class Spy:
      """Its label tells what the worker's surroundings are."""

      num_classes = 2
      classes = ("seen", "hidden")

      def __len__(self):
        return 4

      def __getitem__(self, index):
        import os

        import jax

        hidden = os.environ["CUDA_VISIBLE_DEVICES"] == ""
        on_cpu = jax.config.jax_platforms == "cpu"
        pixels = np.zeros((8, 8, 3), np.uint8)
        return {"image": pixels, "label": int(hidden and on_cpu)}

      def name(self, index):
        return str(index)

    config = DataConfig(image_size=8, num_workers=1)
    with evaluation_batches(Spy(), config, batch_size=4) as batches:
      assert next(batches)["label"].tolist() == [1, 1, 1, 1]
