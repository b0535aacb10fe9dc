"""Smaller copies of large images."""

import io
import json
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_sample_image

from spatial_mamba_jax.data import DataConfig, open_source
from spatial_mamba_jax.data.prepare_imagenet import main
from spatial_mamba_jax.data.shrink import map_in_order, shrink
from spatial_mamba_jax.data.transforms import (
  decode_image,
  transform_for_evaluation,
)


def encode(image: Image.Image, kind: str = "JPEG", **settings) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **settings)
  return file.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  error = ((a.astype(float) - b) ** 2).mean()
  return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ((2000, 1500), (512, 384)),
    ((1500, 2000), (384, 512)),
    ((513, 400), (512, 399)),
    ((1024, 512), (512, 256)),
    # Evaluation needs a shorter side of 256 pixels.
    ((2000, 500), (1024, 256)),
    ((300, 3000), (256, 2560)),
  ],
)
def test_sizes(old, new):
  copy = shrink(encode(Image.new("RGB", old)), 512)
  assert Image.open(io.BytesIO(copy)).size == new


@pytest.mark.parametrize("size", [(512, 512), (500, 375), (3000, 256), (9, 9)])
def test_other_images_keep_their_bytes(size):
  file = encode(Image.new("RGB", size, "red"))
  assert shrink(file, 512) == file


def test_files_that_cannot_be_decoded_keep_their_bytes():
  file = encode(Image.new("RGB", (1200, 900), "red"))
  for broken in (file[: len(file) // 2], b"<html>404</html>", b""):
    assert shrink(broken, 512) == broken


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_copy_is_a_jpeg_without_subsampling(mode):
  image = Image.linear_gradient("L").resize((800, 600)).convert(mode)
  exif = Image.Exif()
  exif[0x0112] = 6  # An orientation, which decoding ignores.
  kinds = ("JPEG",) if mode == "CMYK" else ("JPEG", "PNG")
  for kind in kinds:
    file = encode(image, kind, exif=exif)
    copy = Image.open(io.BytesIO(shrink(file, 512)))
    assert (copy.format, copy.mode, copy.size) == ("JPEG", "RGB", (512, 384))
    assert [layer[1:3] for layer in copy.layer] == [(1, 1)] * 3
    assert not copy.getexif()
    small = decode_image(file).resize((512, 384))
    assert psnr(np.asarray(copy), np.asarray(small)) > 45


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_evaluation_inputs_of_photographs_stay_close(name):
  file = encode(Image.fromarray(load_sample_image(name)), quality=95)
  copy = shrink(file, 512)
  assert len(copy) < 0.7 * len(file)
  inputs = [
    transform_for_evaluation(decode_image(x), DataConfig().preprocessing)
    for x in (file, copy)
  ]
  assert psnr(*inputs) > 40


def test_maps_in_order_a_few_ahead():
  started = []

  def square(index: int) -> int:
    started.append(index)
    return index**2

  squares = map_in_order(square, 10**9)
  assert [next(squares) for _ in range(50)] == [i**2 for i in range(50)]
  squares.close()
  assert len(started) < 10**4


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
  root = tmp_path_factory.mktemp("tree")
  for split in ("train", "val"):
    for i, side in enumerate((200, 400, 800)):
      directory = root / split / f"n{i}"
      directory.mkdir(parents=True)
      image = Image.radial_gradient("L").resize((side, side)).convert("RGB")
      image.save(directory / f"{split}_{i}.JPEG")
  return root


@pytest.fixture(scope="module")
def data_dir(tree, tmp_path_factory) -> pathlib.Path:
  data_dir = tmp_path_factory.mktemp("tfds")
  options = f"--image_folder={tree}", f"--data_dir={data_dir}"
  assert main([*options, "--max_side=300"]) == 0
  return data_dir


class TestPreparing:
  def records(self, data_dir, split="train"):
    config = DataConfig(name="imagenet2012", data_dir=str(data_dir))
    source = open_source(config, split)
    return {source.name(i): source[i] for i in range(len(source))}

  @pytest.mark.parametrize(
    ("split", "directory"), [("train", "train"), ("validation", "val")]
  )
  def test_shrinks_large_images_alone(self, tree, data_dir, split, directory):
    records = self.records(data_dir, split)
    assert len(records) == 3
    for i, side in enumerate((200, 300, 300)):
      name = f"{directory}_{i}.JPEG"
      record = records[f"{split}/{name}"]
      assert record["label"] == i
      assert decode_image(record["image"]).size == (side, side)
      file = (tree / directory / f"n{i}" / name).read_bytes()
      assert record["image"] == shrink(file, 300)
      assert (record["image"] == file) == (side == 200)

  def test_tfds_reads_it_and_it_says_what_it_is(self, data_dir):
    theirs = tfds.data_source(
      "imagenet2012",
      split="train",
      data_dir=data_dir,
      decoders={"image": tfds.decode.SkipDecoding()},
    )
    assert [theirs[i] for i in range(3)] == [*self.records(data_dir).values()]
    info = data_dir / "imagenet2012" / "5.1.0" / "dataset_info.json"
    description = json.loads(info.read_text())["description"]
    assert "longer side exceeds 300 pixels" in description

  def test_from_a_prepared_data_set(self, tree, data_dir, tmp_path):
    whole, copy = tmp_path / "whole", tmp_path / "copy"
    assert main([f"--image_folder={tree}", f"--data_dir={whole}"]) == 0
    options = f"--from_data_dir={whole}", f"--data_dir={copy}"
    assert main([*options, "--max_side=300"]) == 0
    for split in ("train", "validation"):
      expected = self.records(data_dir, split)
      assert [*self.records(copy, split).items()] == [*expected.items()]

  def refuse(self, capsys, *arguments):
    assert main([*arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error

  def test_is_refused_if_too_small_for_the_recipe(self, tree, tmp_path, capsys):
    options = f"--image_folder={tree}", f"--data_dir={tmp_path / 'x'}"
    error = self.refuse(capsys, *options, "--max_side=255")
    assert "--max_side must be at least 256, got 255: evaluation at" in error
    assert not (tmp_path / "x").exists()

  def test_reads_from_one_place(self, tmp_path, data_dir, capsys):
    error = self.refuse(
      capsys, f"--from_data_dir={tmp_path}", f"--data_dir={tmp_path / 'x'}"
    )
    assert "imagenet2012 5.1.0 is not prepared in" in error
    error = self.refuse(
      capsys, f"--from_data_dir={data_dir}", f"--data_dir={data_dir}"
    )
    assert "or choose another --data_dir" in error
    for sources in ((), ("--from_data_dir=a", "--image_folder=b")):
      with pytest.raises(SystemExit):
        main([*sources])
