"""Folders of images with label maps, and ADE20K's directory."""

import os
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data import DataConfig, DataError, open_source
from spatial_mamba_jax.data.sources import SegmentedSource, Source

SIZES = ((8, 12), (10, 6), (8, 12))


def save(path: pathlib.Path, pixels: np.ndarray, **options) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, **options)


def labels_of(number: int) -> np.ndarray:
  height, width = SIZES[number]
  values = np.arange(height * width, dtype=np.uint8).reshape(height, width)
  return (values + number) % 4


def add_pairs(images: pathlib.Path, labels: pathlib.Path) -> None:
  """Adds three images, one in a directory of its own."""
  rng = np.random.default_rng(0)
  for number, name in enumerate(("a/x", "b", "c")):
    pixels = rng.integers(0, 256, (*SIZES[number], 3), np.uint8)
    save(images / f"{name}.jpg", pixels)
    save(labels / f"{name}.png", labels_of(number))


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  root = tmp_path / "folder"
  for split in ("train", "val"):
    add_pairs(root / "images" / split, root / "labels" / split)
  (root / "classes.txt").write_text("sky\nroad, wet\ncar\nä\n\n", "utf-8")
  return root


@pytest.fixture
def ade20k(tmp_path) -> pathlib.Path:
  root = tmp_path / "ADEChallengeData2016"
  for split in ("training", "validation"):
    add_pairs(root / "images" / split, root / "annotations" / split)
  rows = (
    f"{i}\t0.5\t9\t3\t{f'name {i}, synonym' if i % 2 else f'name {i} '}"
    for i in range(1, 151)
  )
  table = "\n".join(("Idx\tRatio\tTrain\tVal\tName", *rows))
  (root / "objectInfo150.txt").write_text(f"{table}\n")
  return root


def open_at(root, split="train", name="segmentation_folder", **settings):
  config = DataConfig(name=name, data_dir=str(root), **settings)
  source = open_source(config, split)
  assert isinstance(source, SegmentedSource)
  return source


def is_refused(root, message, split="train", **settings) -> None:
  with pytest.raises(DataError) as caught:
    open_at(root, split, **settings)
  assert re.search(message, str(caught.value)), str(caught.value)
  assert "\n" not in str(caught.value)


class TestFolder:
  def test_reads_pairs(self, folder):
    for split, directory in (("train", "train"), ("validation", "val")):
      source = open_at(folder, split)
      images = folder / "images" / directory
      names = [source.name(i) for i in range(len(source))]
      assert names == [str(images / x) for x in ("a/x.jpg", "b.jpg", "c.jpg")]
      assert source.num_classes == 4
      assert list(source.classes) == ["sky", "road, wet", "car", "ä"]
      assert source.palette.shape == (4, 3)
      for i, name in enumerate(("a/x", "b", "c")):
        record = source[i]
        labels = folder / "labels" / directory / f"{name}.png"
        assert record["image"] == pathlib.Path(source.name(i)).read_bytes()
        assert record["labels"] == labels.read_bytes()
        assert record["offset"] == 0
        assert record["ignored"] == 255
        assert source.image_size(i) == SIZES[i]

  def test_a_file_that_vanishes_is_unreadable(self, folder):
    source = open_at(folder)
    (folder / "labels" / "train" / "b.png").unlink()
    with pytest.raises(
      ValueError, match=r"^its label map cannot be read: No such file"
    ):
      source[1]
    (folder / "images" / "train" / "b.jpg").unlink()
    for read in (source.__getitem__, source.image_size):
      with pytest.raises(FileNotFoundError):
        read(1)

  def test_is_a_source_of_workers(self, folder):
    source = open_at(folder, ignored_label=7)
    assert isinstance(source, Source)
    again = pickle.loads(pickle.dumps(source))
    assert again[1] == source[1]
    assert again[1]["ignored"] == 7

  def test_validation_may_be_spelt_out(self, folder):
    for kind in ("images", "labels"):
      (folder / kind / "val").rename(folder / kind / "validation")
    assert len(open_at(folder, "validation")) == 3

  def test_other_files_and_suffixes(self, folder):
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    (images / "b.jpg").rename(images / "b.JPEG")
    (labels / "b.png").rename(labels / "b.PNG")
    (images / "notes.txt").write_text("")
    (labels / "colours.txt").write_text("")
    name = os.fsdecode(b"caf\xe9.v2")
    shutil.copy(images / "c.jpg", images / f"{name}.jpg")
    shutil.copy(labels / "c.png", labels / f"{name}.png")
    source = open_at(folder)
    assert len(source) == 4
    assert all(source[i]["labels"] for i in range(4))
    assert open_at(folder)[1]["labels"] == (labels / "b.PNG").read_bytes()

  def test_size_is_upright(self, folder):
    path = folder / "images" / "train" / "b.jpg"
    exif = Image.Exif()
    exif[274] = 6
    save(path, np.zeros((6, 10, 3), np.uint8), exif=exif)
    assert open_at(folder).image_size(1) == (10, 6)

  def test_a_missing_pair(self, folder):
    images, labels = folder / "images" / "train", folder / "labels" / "train"
    (labels / "a" / "x.png").rename(folder / "x.png")
    is_refused(
      folder,
      f"1 of 3 images in {images} have no label map: add "
      f"{labels}/a/x.png, or remove {images}/a/x.jpg",
    )
    (folder / "x.png").rename(labels / "a" / "x.png")
    (images / "c.jpg").unlink()
    is_refused(
      folder,
      f"1 of 3 label maps in {labels} have no image: add {images}/c[.][*], or "
      f"remove {labels}/c.png",
    )

  def test_an_unclear_pair(self, folder):
    images = folder / "images" / "train"
    shutil.copy(images / "b.jpg", images / "b.bmp")
    is_refused(folder, "b.bmp and .*b.jpg differ in their suffix only")

  def test_what_is_missing(self, folder):
    for kind in ("images", "labels"):
      (folder / kind / "val").rename(folder / kind / "test")
    is_refused(
      folder,
      f"no directory val/ or validation/ in {folder}/images",
      "validation",
    )
    shutil.rmtree(folder / "labels" / "train")
    is_refused(folder, f"no directory train/ in {folder}/labels")
    (folder / "classes.txt").unlink()
    is_refused(folder, f"cannot read {folder}/classes.txt: No such file")
    is_refused("", "config.data.data_dir must name the segmentation_folder's")

  def test_no_images(self, folder):
    for kind in ("images", "labels"):
      shutil.rmtree(folder / kind / "train")
      (folder / kind / "train").mkdir()
    is_refused(folder, f"{folder}/images/train has no images: they end in one")

  @pytest.mark.parametrize(
    ("content", "message"),
    [
      (b"\n \n", "is empty: write one class name a line"),
      (b"a\n\nb\n", "line 2 of .*classes.txt is empty"),
      (b"a\nb\na\n", "line 3 of .*classes.txt repeats the class a"),
      (b"\xff\xfe\x00", "classes.txt is not UTF-8 text"),
    ],
  )
  def test_wrong_class_names(self, folder, content, message):
    (folder / "classes.txt").write_bytes(content)
    is_refused(folder, message)

  def test_class_names_of_an_editor(self, folder):
    (folder / "classes.txt").write_bytes(b"\xef\xbb\xbfa\r\nb \r\n")
    assert list(open_at(folder).classes) == ["a", "b"]

  def test_an_ignored_label_that_is_a_class(self, folder):
    is_refused(
      folder,
      "ignored_label=2 is also the class car of .*classes.txt: choose a value"
      " from 4 on",
      ignored_label=2,
    )
    assert len(open_at(folder, ignored_label=4)) == 3


class TestADE20K:
  def test_reads_pairs(self, ade20k):
    for split, directory in (
      ("train", "training"),
      ("validation", "validation"),
    ):
      for root in (ade20k, ade20k.parent):
        source = open_at(root, split, "ade20k")
        assert len(source) == 3
        assert source.name(1) == str(ade20k / "images" / directory / "b.jpg")
        labels = ade20k / "annotations" / directory / "b.png"
        assert source[1]["labels"] == labels.read_bytes()
        assert source[1]["offset"] == 1
        assert source[1]["ignored"] == 0
        assert source.num_classes == 150
        assert source.classes[:3] == ("name 1", "name 2", "name 3")
        assert source.palette.shape == (150, 3)
        assert source.image_size(1) == SIZES[1]

  def test_columns_are_found_by_name(self, ade20k):
    path = ade20k / "objectInfo150.txt"
    rows = [x.split("\t") for x in path.read_text().splitlines()]
    path.write_text(
      "\n".join(
        "\t".join([a, b, c, d, "0", e]) for a, b, c, d, e in rows
      ).replace("\tVal\t0\t", "\tVal\tStuff\t")
    )
    assert open_at(ade20k, name="ade20k").classes[2] == "name 3"

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (lambda x: "", "must be a table with the columns Idx and Name"),
      (lambda x: x.replace("Idx", "#"), "with the columns Idx and Name"),
      (
        lambda x: x.replace("\n7\t", "\n8\t"),
        "line 8 of .* have the Idx 7 and",
      ),
      (
        lambda x: x.replace("name 4 ", " "),
        "line 5 of .* the Idx 4 and a Name",
      ),
      (lambda x: x[: x.index("\n100\t")], "has 99 classes of 150"),
    ],
  )
  def test_a_malformed_table(self, ade20k, change, message):
    path = ade20k / "objectInfo150.txt"
    path.write_text(change(path.read_text()))
    is_refused(
      ade20k, f"{message}.*from ADEChallengeData2016.zip", name="ade20k"
    )

  def test_what_is_missing(self, ade20k):
    (ade20k / "annotations" / "training" / "b.png").unlink()
    is_refused(ade20k, "1 of 3 images .* have no label map", name="ade20k")
    (ade20k / "objectInfo150.txt").unlink()
    is_refused(
      ade20k, f"cannot read {ade20k}/objectInfo150.txt: No such", name="ade20k"
    )
    shutil.rmtree(ade20k / "annotations")
    is_refused(
      ade20k,
      f"config.data.data_dir={ade20k} must be ADEChallengeData2016, which "
      "holds images/, annotations/ and objectInfo150.txt: unpack",
      name="ade20k",
    )
    is_refused(
      "", "config.data.data_dir must name the directory ADE", name="ade20k"
    )
