"""The embedded digits."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn import datasets

from spatial_mamba_jax.data import DataConfig, DataError, open_source
from spatial_mamba_jax.errors import UserError

# Opens the digits as a run does, and names modules that it must not import.
RUN = """
import sys
from spatial_mamba_jax.data import *
config = DataConfig(data_dir=sys.argv[1], image_size=32)
source = open_source(config, "train")
with train_batches(source, config, batch_size=10, seed=0) as batches:
  assert next(batches)["image"].shape == (10, 32, 32, 3)
print(len(source), "tensorflow" in sys.modules)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
  return DataConfig(data_dir=str(tmp_path_factory.mktemp("tfds")))


def test_splits_are_all_the_digits(config):
  digits = datasets.load_digits()
  seen = []
  for split, count in (("train", 1500), ("validation", 297)):
    source = open_source(config, split)
    assert len(source) == count
    assert source.num_classes == 10
    labels = [source[i]["label"] for i in range(count)]
    assert np.bincount(labels, minlength=10).min() > 0.08 * count
    for i in range(count):
      prefix, number = source.name(i).removesuffix(".png").split("_")
      assert prefix == f"{split}/digit"
      seen.append(int(number))
      assert labels[i] == digits.target[seen[-1]]
      grey = digits.images[seen[-1]] * (255 / 16)
      # PNG is exact; the grey values were rounded to integers.
      pixels = np.broadcast_to(grey[:, :, None], (8, 8, 3))
      np.testing.assert_allclose(source[i]["image"], pixels, atol=0.5)
  assert sorted(seen) == list(range(1797))


def test_two_processes_may_prepare_at_once_and_without_tensorflow(tmp_path):
  runs = [
    subprocess.Popen(
      [sys.executable, "-c", RUN, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  for run in runs:
    output, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert output.splitlines()[-1] == "1500 False"
  assert [path.name for path in tmp_path.glob("digits/*")] == ["1.0.0"]


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "digits").write_text("a file in the way")
  with pytest.raises(DataError, match=r"cannot prepare .*1.0.0"):
    open_source(DataConfig(data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize(
  ("data_dir", "expected"),
  [
    ("gs://bucket", "must be a directory of this machine"),
    ("/proc/nowhere", r"cannot prepare /proc/nowhere/digits/1\.0\.0: .*proc"),
    ("/" + "x" * 300, "File name too long"),
    ("/tmp\0", "must be a string"),
    ("~nobody-of-that-name", "there is no home directory for ~nobody"),
  ],
)
def test_impossible_directories_are_named(data_dir, expected):
  with pytest.raises(UserError, match=expected) as caught:
    open_source(DataConfig(data_dir=data_dir), "train")
  assert "\n" not in str(caught.value)


def test_no_home_directory(monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "")
  monkeypatch.setattr("os.path.expanduser", lambda path: path)
  with pytest.raises(UserError, match=r"no home directory .*data\.data_dir$"):
    open_source(DataConfig(), "train")
