"""TFDS's ImageNet, prepared and read."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from spatial_mamba_jax.data import (
  DataConfig,
  DataError,
  evaluation_batches,
  open_source,
)
from spatial_mamba_jax.data.prepare_imagenet import main


def prepare(root, data_dir) -> int:
  return main([f"--image_folder={root}", f"--data_dir={data_dir}"])


def config_for(data_dir) -> DataConfig:
  return DataConfig(name="imagenet2012", data_dir=str(data_dir))


@pytest.fixture(scope="module")
def data_dir(image_tree, tmp_path_factory) -> pathlib.Path:
  directory = tmp_path_factory.mktemp("tfds")
  assert prepare(image_tree, directory) == 0
  return directory


@pytest.fixture
def tree(image_tree, tmp_path):
  return shutil.copytree(image_tree, tmp_path / "tree")


class TestPrepared:
  @pytest.mark.parametrize(
    ("split", "directory"), [("train", "train"), ("validation", "val")]
  )
  def test_holds_the_files_in_the_order_of_tfds(
    self, image_tree, data_dir, split, directory
  ):
    files = {path.name: path for path in image_tree.glob(f"{directory}/*/*")}
    hasher = tfds.core.hashing.Hasher(split)  # TFDS orders by hashed keys.
    names = sorted(files, key=hasher.hash_key)
    source = open_source(config_for(data_dir), split)
    assert source.num_classes == 3
    assert len(source) == len(names)
    for i, name in enumerate(names):
      assert source.name(i) == f"{split}/{name}"
      assert source[i]["image"] == files[name].read_bytes()
      wnids = ["n01440764", "n02102040", "n03000684"]
      assert source[i]["label"] == wnids.index(files[name].parent.name)

  def test_tfds_reads_it_by_its_name(self, data_dir):
    theirs = tfds.data_source(
      "imagenet2012",
      split="train",
      data_dir=data_dir,
      decoders={"image": tfds.decode.SkipDecoding()},
    )
    ours = open_source(config_for(data_dir), "train")
    assert len(theirs) == len(ours)
    for i in range(len(ours)):
      assert theirs[i] == ours[i]

  def test_a_damaged_record_is_an_unreadable_image(self, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "tfds")
    (path,) = copy.rglob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    content[500] ^= 0xFF  # Amid the first record; records have checksums.
    path.write_bytes(content)
    config = config_for(copy)
    config.image_size, config.max_unreadable_share = 16, 0.1
    source = open_source(config, "train")
    with evaluation_batches(source, config, batch_size=12) as batches:
      (batch,) = batches
      (index,) = np.flatnonzero(~batch["mask"])
      assert batches.unreadable == (f"train[{index}]",)

  def test_is_described_as_by_tfds(self, data_dir):
    directory = data_dir / "imagenet2012" / "5.1.0"
    features = json.loads((directory / "features.json").read_text())
    kinds = {
      name: feature["pythonClassName"].rsplit(".", 1)[1]
      for name, feature in features["featuresDict"]["features"].items()
    }
    assert kinds == {
      "image": "Image",
      "label": "ClassLabel",
      "file_name": "Text",
    }
    image = features["featuresDict"]["features"]["image"]["image"]
    assert image["encodingFormat"] == "jpeg"
    info = json.loads((directory / "dataset_info.json").read_text())
    assert (info["name"], info["version"]) == ("imagenet2012", "5.1.0")
    assert info["fileFormat"] == "array_record"
    assert info["supervisedKeys"]["tuple"]["items"] == [
      {"featureKey": "image"},
      {"featureKey": "label"},
    ]
    labels = (directory / "label.labels.txt").read_text().split()
    assert labels == ["n01440764", "n02102040", "n03000684"]

  def test_is_not_overwritten(self, image_tree, data_dir, capsys):
    assert prepare(image_tree, data_dir) == 2
    assert "5.1.0 exists: remove it" in capsys.readouterr().err

  def test_other_formats_are_refused(self, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "tfds")
    path = copy / "imagenet2012" / "5.1.0" / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"stored as tfrecord.*=array_record"):
      open_source(config_for(copy), "train")

  def test_missing_split(self, data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "tfds")
    path = copy / "imagenet2012" / "5.1.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"] = [s for s in info["splits"] if s["name"] == "train"]
    path.write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"no validation split, only train$"):
      open_source(config_for(copy), "validation")


def test_unprepared_says_which_command_prepares_it(tmp_path):
  with pytest.raises(DataError) as caught:
    open_source(config_for(tmp_path), "train")
  message = str(caught.value)
  assert "python -m spatial_mamba_jax.data.prepare_imagenet" in message
  assert f"--data_dir={tmp_path}" in message
  assert "\n" not in message


class TestTreesThatAreRefused:
  def refuse(self, tree, tmp_path, capsys, message):
    assert prepare(tree, tmp_path / "tfds") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "tfds").exists()

  def test_missing_split(self, tree, tmp_path, capsys):
    shutil.rmtree(tree / "val")
    self.refuse(tree, tmp_path, capsys, "no directory val/ or validation/")

  def test_no_such_tree(self, tmp_path, capsys):
    self.refuse(tmp_path / "x", tmp_path, capsys, "no directory train/")

  def test_split_without_images(self, tree, tmp_path, capsys):
    for path in tree.glob("train/*/*"):
      path.rename(path.with_suffix(".png"))
    self.refuse(tree, tmp_path, capsys, "train has no images")

  def test_files_beside_the_class_directories(self, tree, tmp_path, capsys):
    for path in tree.glob("val/*/*"):
      path.rename(tree / "val" / path.name)
    self.refuse(tree, tmp_path, capsys, "val has no images")

  def test_classes_that_differ(self, tree, tmp_path, capsys):
    (tree / "val" / "n9").mkdir()
    self.refuse(tree, tmp_path, capsys, "in one of them only: n9")

  def test_names_that_are_not_unique(self, tree, tmp_path, capsys):
    for directory in tree.glob("train/*"):
      next(directory.iterdir()).rename(directory / "1.JPEG")
    self.refuse(tree, tmp_path, capsys, "are called 1.JPEG")

  def test_class_names_that_are_no_lines(self, tree, tmp_path, capsys):
    for name in ("two\nlines", " space", os.fsdecode(b"caf\xe9")):
      for split in ("train", "val"):
        (tree / split / name).mkdir()
      self.refuse(tree, tmp_path, capsys, "cannot be a class: its name is no")
      for split in ("train", "val"):
        (tree / split / name).rmdir()

  def test_trees_that_are_no_directories(self, tree, tmp_path, capsys):
    self.refuse(tree / ("x" * 300), tmp_path, capsys, "File name too long")
    self.refuse("gs://bucket", tmp_path, capsys, "directory of this machine")
    self.refuse("~nobody-of-that-name", tmp_path, capsys, "no home directory")


class TestTargetsThatCannotBeWritten:
  def refuse(self, tree, data_dir, capsys, message):
    assert prepare(tree, data_dir) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert "prepare_imagenet: " in last

  def test_paths(self, tree, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    self.refuse(tree, file, capsys, "Not a directory")
    self.refuse(tree, file / "x", capsys, "Not a directory")
    self.refuse(tree, tmp_path / ("x" * 300), capsys, "File name too long")
    self.refuse(tree, "s3://bucket", capsys, "directory of this machine")

  def test_no_home_directory(self, tree, monkeypatch, capsys):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", "~")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    self.refuse(tree, "", capsys, "there is no home directory for ~")

  def test_a_disk_that_is_full_half_way(self, tree, tmp_path):
    """Stands in for a full disk: no file may be larger than some records."""
    code = (
      "import resource, signal, sys\n"
      "from spatial_mamba_jax.data.prepare_imagenet import main\n"
      "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
      "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
      "sys.exit(main(sys.argv[1:]))\n"
    )
    data_dir = tmp_path / "tfds"
    arguments = (f"--image_folder={tree}", f"--data_dir={data_dir}")
    result = subprocess.run(
      (sys.executable, "-c", code, *arguments), capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    *_, last = result.stderr.splitlines()
    assert "prepare_imagenet: cannot prepare" in last
    assert not [path for path in data_dir.rglob("*") if path.is_file()]
    assert prepare(tree, data_dir) == 0


def test_usage_shows_the_command(capsys):
  with pytest.raises(SystemExit):
    main(["--help"])
  usage = capsys.readouterr().out
  assert "usage: python -m spatial_mamba_jax.data.prepare_imagenet " in usage


def test_names_may_be_in_any_encoding(tree, tmp_path):
  names = (b"caf\xe9.JPEG", "caf\N{EURO SIGN}.JPEG".encode())
  image = next(tree.glob("train/n01440764/*"))
  for name in names:
    shutil.copy(image, os.fsencode(image.parent) + b"/" + name)
  assert prepare(tree, tmp_path / "tfds") == 0
  source = open_source(config_for(tmp_path / "tfds"), "train")
  found = {os.fsencode(source.name(i)) for i in range(len(source))}
  assert {b"train/" + name for name in names} < found
  assert len(found) == 14


def test_a_failed_run_leaves_nothing_behind(tree, tmp_path, capsys):
  dangling = tree / "val" / "n01440764" / "dangling.JPEG"
  dangling.symlink_to(tree / "nowhere")
  assert prepare(tree, tmp_path / "tfds") == 2
  *_, error = capsys.readouterr().err.splitlines()
  assert f"{dangling}: No such file or directory" in error
  assert not [path for path in tmp_path.glob("tfds/**/*") if path.is_file()]
  dangling.unlink()
  assert prepare(tree, tmp_path / "tfds") == 0
