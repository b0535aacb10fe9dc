"""Damaged and hostile files of data sets that TFDS prepared."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data import (
  DataConfig,
  DataError,
  imagenet,
  open_source,
  tfds_files,
  train_batches,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
  """30 training images of 3 classes, and 3 to validate."""
  root = tmp_path_factory.mktemp("tfds_files")
  rng = np.random.default_rng(0)
  for split, count in (("train", 10), ("val", 1)):
    for name in "abc":
      directory = root / "tree" / split / name
      directory.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{split}_{name}_{i}.JPEG")
  imagenet.prepare(root / "tree", str(root / "tfds"))
  open_source(DataConfig(name="digits", data_dir=str(root / "tfds")), "train")
  return root / "tfds"


@pytest.fixture
def data_dir(prepared, tmp_path) -> pathlib.Path:
  return shutil.copytree(prepared, tmp_path / "tfds")


@pytest.fixture
def version(data_dir) -> pathlib.Path:
  return data_dir / "imagenet2012" / "5.1.0"


def open_train(data_dir, name="imagenet2012"):
  config = DataConfig(name=name, data_dir=str(data_dir), image_size=16)
  return open_source(config, "train"), config


def refuse(data_dir, named, name="imagenet2012") -> str:
  """Returns the error line, which names a file and the remedy."""
  with pytest.raises(DataError) as caught:
    open_train(data_dir, name)
  message = str(caught.value)
  assert "\n" not in message
  assert named in message
  assert "remove " in message
  remedy = "is prepared again" if name == "digits" else "prepare_imagenet"
  assert remedy in message
  return message


def replace(path: pathlib.Path, value: object, *keys) -> None:
  """Sets the value at the keys in a JSON file; `...` removes it."""
  content = inner = json.loads(path.read_text())
  for key in keys[:-1]:
    inner = inner[key]
  if value is ...:
    del inner[keys[-1]]
  else:
    inner[keys[-1]] = value
  path.write_text(json.dumps(content))


def as_directory(path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


def halve(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


SPOIL = {
  "empty": lambda path: path.write_bytes(b""),
  "missing": lambda path: path.unlink(),
  "half": halve,
  "binary": lambda path: path.write_bytes(bytes(range(256)) * 400),
  "zeros": lambda path: path.write_bytes(bytes(100_000)),
  "a directory": as_directory,
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("name", ["imagenet2012", "digits"])
@pytest.mark.parametrize(
  "pattern", ["dataset_info.json", "features.json", "*-train.*"]
)
def test_damaged_files(data_dir, name, pattern, how):
  (path,) = (data_dir / name).glob(f"*/{pattern}")
  SPOIL[how](path)
  refuse(data_dir, f"{path} is damaged", name)


@pytest.mark.parametrize(
  "content",
  ["null", "[]", "1", '"x"', "{}", "[" * 20_000, '{"a":' * 20_000, "1" * 5000],
)
@pytest.mark.parametrize("file_name", ["dataset_info.json", "features.json"])
def test_other_json(data_dir, version, file_name, content):
  (version / file_name).write_text(content)
  refuse(data_dir, f"{version / file_name} is damaged")


LABEL = ("featuresDict", "features", "label")


@pytest.mark.parametrize(
  ("file_name", "keys", "value"),
  [
    ("dataset_info.json", ("fileFormat",), ...),
    ("dataset_info.json", ("fileFormat",), 5),
    ("dataset_info.json", ("name",), "../../other"),
    ("dataset_info.json", ("name",), ...),
    ("dataset_info.json", ("splits",), "train"),
    ("dataset_info.json", ("splits", 0), None),
    ("dataset_info.json", ("splits", 0, "name"), ["train"]),
    ("dataset_info.json", ("splits", 1, "name"), "train"),
    ("dataset_info.json", ("splits", 0, "numBytes"), "many"),
    ("dataset_info.json", ("splits", 0, "filepathTemplate"), "{SPLIT:>9999}"),
    ("dataset_info.json", ("splits", 0, "shardLengths"), ...),
    ("dataset_info.json", ("splits", 0, "shardLengths"), []),
    ("dataset_info.json", ("splits", 0, "shardLengths"), "30"),
    ("dataset_info.json", ("splits", 0, "shardLengths"), ["0"]),
    ("dataset_info.json", ("splits", 0, "shardLengths"), ["-5"]),
    ("dataset_info.json", ("splits", 0, "shardLengths"), [None]),
    ("dataset_info.json", ("splits", 0, "shardLengths"), [True]),
    ("dataset_info.json", ("splits", 0, "shardLengths"), ["3" * 30]),
    ("features.json", ("featuresDict", "features"), {}),
    ("features.json", LABEL, ...),
    ("features.json", LABEL, "label"),
    ("features.json", (*LABEL, "classLabel"), ...),
    ("features.json", (*LABEL, "classLabel", "numClasses"), ...),
    ("features.json", (*LABEL, "classLabel", "numClasses"), "0"),
    ("features.json", (*LABEL, "classLabel", "numClasses"), 10**12),
    ("features.json", ("featuresDict", "features", "image"), ...),
  ],
)  # fmt: skip
def test_other_values(data_dir, version, file_name, keys, value):
  replace(version / file_name, value, *keys)
  refuse(data_dir, f"{version / file_name} is damaged")


def test_a_label_of_another_class(data_dir, version):
  path = version / "features.json"
  text = json.loads(path.read_text())["featuresDict"]["features"]["file_name"]
  key = "pythonClassName"
  for value, *keys in ((text[key], key), (text,)):
    replace(path, value, *LABEL, *keys)
    assert "no feature label of the class ClassLabel" in refuse(
      data_dir, str(path)
    )


@pytest.mark.parametrize("count", [29, 31])
def test_other_numbers_of_records(data_dir, version, count):
  path = version / "dataset_info.json"
  replace(path, [str(count)], "splits", 0, "shardLengths")
  message = refuse(data_dir, "imagenet2012-train.array_record-00000-of-00001")
  assert f"it has 30 records, {count} by dataset_info.json" in message


def test_other_numbers_of_shards(data_dir, version):
  path = version / "dataset_info.json"
  replace(path, ["10", "20"], "splits", 0, "shardLengths")
  refuse(data_dir, "imagenet2012-train.array_record-00000-of-00002")


@pytest.mark.parametrize(
  "content", [b"", b"a\nb\n", b"a\nb\nb\n", b"\xff\xfe", b"a\nb\nc\nd\n"]
)
def test_another_number_of_class_names(data_dir, version, content):
  path = version / "label.labels.txt"
  path.write_bytes(content)
  refuse(data_dir, f"{path} is damaged")


def test_classes_without_names_have_numbers(data_dir, version):
  (version / "label.labels.txt").unlink()
  source, _ = open_train(data_dir)
  assert source.classes == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["imagenet2012", "digits"])
def test_a_directory_without_files(data_dir, name):
  for path in (data_dir / name).glob("*/*"):
    path.unlink()
  refuse(data_dir, "dataset_info.json is damaged", name)


def test_a_damaged_record_of_the_digits(data_dir):
  (path,) = (data_dir / "digits").glob("*/*-train.*")
  content = bytearray(path.read_bytes())
  content[500] ^= 0xFF
  path.write_bytes(content)
  refuse(data_dir, str(path.parent), "digits")


def test_shards_that_vanish_later_are_unreadable_images(data_dir, version):
  source, config = open_train(data_dir)
  next(version.glob("*-train.*")).unlink()
  with (
    train_batches(source, config, batch_size=5, seed=0) as batches,
    pytest.raises(
      DataError, match=r"of 30 images are unreadable.*train\[\d+\]"
    ),
  ):
    next(batches)


def test_labels_beyond_the_classes_name_their_record(data_dir, version):
  replace(version / "features.json", "2", *LABEL, "classLabel", "numClasses")
  (version / "label.labels.txt").unlink()
  source, config = open_train(data_dir)
  config.num_workers = 1
  with (
    train_batches(source, config, batch_size=30, seed=0) as batches,
    pytest.raises(
      DataError, match=r"^train/train_c_\d\.JPEG: its label is 2, "
    ),
  ):
    next(batches)


class TestForeignCode:
  """`features.json` names classes, which TFDS would import."""

  MODULE = "module_that_came_with_the_data"
  CLASS = f"{MODULE}.Label"

  @pytest.fixture(autouse=True)
  def module(self, data_dir, version, monkeypatch):
    """Returns code that would write a file if imported, and that file."""
    for directory in (data_dir, version):
      written = directory / "was_imported"
      (directory / f"{self.MODULE}.py").write_text(
        f"import pathlib\npathlib.Path({str(written)!r}).touch()\n"
      )
      monkeypatch.syspath_prepend(str(directory))
    yield
    assert not list(data_dir.rglob("was_imported"))
    assert self.MODULE not in sys.modules

  @pytest.mark.parametrize(
    "key", ["pythonClassName", "python_class_name", "type"]
  )
  @pytest.mark.parametrize(
    "keys",
    [
      (),
      LABEL,
      ("featuresDict", "features", "image"),
      ("featuresDict", "features", "file_name"),
    ],
  )
  def test_of_any_feature(self, data_dir, version, keys, key):
    path = version / "features.json"
    replace(path, self.CLASS, *keys, key)
    assert self.CLASS in refuse(data_dir, f"{path} is damaged")

  @pytest.mark.parametrize(
    "feature",
    [
      {"sequence": {"feature": {"pythonClassName": CLASS}}},
      {"jsonFeature": {"json": json.dumps({"x": {"type": CLASS}})}},
      {"content": json.dumps({"a": json.dumps([{"type": CLASS}])})},
      [{"featuresDict": {"features": {"y": {"python_class_name": CLASS}}}}],
    ],
  )
  def test_of_nested_features(self, data_dir, version, feature):
    path = version / "features.json"
    replace(path, feature, "featuresDict", "features", "more")
    assert self.CLASS in refuse(data_dir, f"{path} is damaged")

  @pytest.mark.parametrize(
    "class_name",
    [
      "tensorflow_datasets.testing.Label",
      "tensorflow_datasets.core.features.other.Label",
      "Label",
      "",
    ],
  )
  def test_names_that_only_resemble(self, data_dir, version, class_name):
    path = version / "features.json"
    replace(path, class_name, *LABEL, "pythonClassName")
    refuse(data_dir, f"{path} is damaged")

  @pytest.mark.parametrize(
    ("key", "value"),
    [
      ("moduleName", MODULE),
      ("features", {"pythonClassName": CLASS, "classLabel": {}}),
    ],
  )
  def test_dataset_info_brings_none(self, data_dir, version, key, value):
    replace(version / "dataset_info.json", value, key)
    source, config = open_train(data_dir)
    config.num_workers = 1
    with train_batches(source, config, batch_size=5, seed=0) as batches:
      assert next(batches)["image"].shape == (5, 16, 16, 3)

  def test_tfds_own_features_are_taken(self, data_dir, version):
    path = version / "features.json"
    name = "tensorflow_datasets.core.features.bounding_boxes.BBoxFeature"
    replace(path, {"pythonClassName": name}, "featuresDict", "features", "box")
    source, _ = open_train(data_dir)
    assert source[0].keys() == {"image", "label", "file_name"}
    assert name in tfds_files._feature_classes()
