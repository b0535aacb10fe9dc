"""Times the input pipeline: `python -m benchmarks.input`.

It times each stage alone on one thread, then the pipeline as training runs it,
in processor seconds an image, so that other work on the machine counts little.
Of each stage it takes the best of several rounds. The lower bound is Pillow's
decoding and resizing alone, of the same crops of the same files. Last, it times
the pipeline with one worker process a core, by wall clock.

Without --data_dir, it reads JPEG files of --photo_size, cut from scikit-learn's
two photographs and prepared as TFDS's imagenet2012. At 500 x 375 pixels, which
many files of ImageNet have, they have 99 kB; ImageNet's average is some 110 kB.

With --max_side, it also measures the smaller copy that `prepare_imagenet
--max_side` writes, and how far evaluation's inputs change.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from spatial_mamba_jax.data import (
  DataConfig,
  Source,
  imagenet,
  open_source,
  train_batches,
  transforms,
)
from spatial_mamba_jax.data.config import DECODERS
from spatial_mamba_jax.data.randaugment import randaugment
from spatial_mamba_jax.data.shrink import shrink
from spatial_mamba_jax.training.config import MeshConfig
from spatial_mamba_jax.training.sharding import make_mesh, shard_batch

ROUNDS = 3
# Images of the synthetic dataset. With fewer, grain's shuffle would dominate.
SYNTHETIC_IMAGES = 1024
DISTINCT = 64
# Most decoded pixels, which take 1 GB: fewer large images are timed.
MAX_PIXELS = 2**28
# JPEG quality of the synthetic files, with 4:2:0 chroma.
QUALITY = 97


def main() -> None:
  """Measures as the command line says."""
  arguments = _parse()
  with tempfile.TemporaryDirectory() as temporary:
    data_dir = arguments.data_dir or f"{temporary}/original"
    if not arguments.data_dir:
      write_imagenet(pathlib.Path(data_dir), arguments.photo_size)
    config = DataConfig(
      name="imagenet2012",
      data_dir=data_dir,
      image_size=arguments.image_size,
      decoder=arguments.decoder,
    )
    images = min(
      arguments.images, MAX_PIXELS // math.prod(arguments.photo_size)
    )
    batch_size = min(arguments.batch_size, max(1, images // 8))
    measured = measure(config, images, batch_size)
    if arguments.max_side:
      copy = f"{temporary}/copy"
      _write_copy(arguments, data_dir, copy)
      copied = dataclasses.replace(config, data_dir=copy)
      measured["copy"] = {
        **measure(copied, arguments.images, arguments.batch_size),
        **measure_change(config, arguments.max_side),
      }
  if arguments.json:
    print(json.dumps({**vars(arguments), **measured}))
    return
  _print(measured)
  if arguments.max_side:
    print(f"\nthe copy of --max_side={arguments.max_side}:")
    _print(measured["copy"])
    print(
      "evaluation's inputs differ from the original's by"
      " {mean_difference:.2f} of 255 levels in the mean; PSNR {psnr:.1f} dB in"
      " the mean, {least_psnr:.1f} at least".format(**measured["copy"])
    )


def _write_copy(
  arguments: argparse.Namespace, data_dir: str, copy: str
) -> None:
  if not arguments.data_dir:
    size, max_side = arguments.photo_size, arguments.max_side
    write_imagenet(pathlib.Path(copy), size, max_side)
    return
  with _silence():
    imagenet.prepare(
      pathlib.Path(data_dir),
      copy,
      read=imagenet.read_prepared,
      max_side=arguments.max_side,
    )


def _print(measured: dict[str, Any]) -> None:
  print(f"{measured['bytes'] / 1000:.0f} kB a file")
  for name, seconds in measured["seconds_an_image"].items():
    print(f"{name:28s} {1e3 * seconds:7.3f} ms  {1 / seconds:8.0f} images/s")
  print(
    f"the pipeline reaches {measured['share_of_pillow']:.0%} of what Pillow"
    " alone does, per core;"
    f" {measured['workers']} workers, by the clock:"
    f" {measured['images_per_second_by_workers']:.0f} images/s"
  )


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.input")
  parser.add_argument(
    "--data_dir", default="", help="a TFDS directory with imagenet2012"
  )
  parser.add_argument(
    "--photo_size",
    type=lambda text: tuple(map(int, text.split("x"))),
    default=(500, 375),
    help="WIDTHxHEIGHT of the files read without --data_dir",
  )
  parser.add_argument("--max_side", type=int, default=0)
  parser.add_argument("--images", type=int, default=1024)
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--decoder", choices=DECODERS, default="pillow")
  parser.add_argument("--json", action="store_true")
  return parser.parse_args()


def measure(config: DataConfig, images: int, batch_size: int) -> dict[str, Any]:
  """Measures every stage and the whole pipeline.

  Args:
    config: the data and transforms.
    images: images to time in each round.
    batch_size: images in a batch.
  """
  source = open_source(config, "train")
  stages = time_stages(source, config, images, batch_size)
  pipeline = time_pipeline(source, config, images, batch_size)
  pillow = stages.pop("Pillow's decode and resize")
  workers = os.cpu_count() or 1
  sample = range(min(DISTINCT, len(source)))
  return {
    "bytes": float(np.mean([len(source[index]["image"]) for index in sample])),
    "seconds_an_image": {
      **stages,
      "whole pipeline": pipeline,
      "Pillow's decode and resize": pillow,
    },
    "share_of_pillow": pillow / pipeline,
    "workers": workers,
    "images_per_second_by_workers": workers_speed(
      source, config, images, batch_size, workers
    ),
  }


def measure_change(config: DataConfig, max_side: int) -> dict[str, float]:
  """Compares evaluation's inputs from some originals and from their copies.

  Args:
    config: the originals, and the size of the inputs.
    max_side: most pixels of a copy's longer side.

  Returns:
    Over these images, "mean_difference", of 255 levels, and "psnr" and
    "least_psnr", in dB (infinite where all inputs are equal).
  """
  source = open_source(config, "train")
  differences, errors = [], []
  for index in range(min(DISTINCT, len(source))):
    file = source[index]["image"]
    one, other = (
      transforms.transform_for_evaluation(
        transforms.decode_image(each), config.preprocessing
      ).astype(np.float64)
      for each in (file, shrink(file, max_side))
    )
    differences.append(np.abs(one - other).mean())
    errors.append(np.square(one - other).mean())
  with np.errstate(divide="ignore"):
    psnr = 10 * np.log10(255**2 / np.array(errors))
  return {
    "mean_difference": float(np.mean(differences)),
    "psnr": float(psnr.mean()),
    "least_psnr": float(psnr.min()),
  }


def time_stages(
  source: Source, config: DataConfig, images: int, batch_size: int
) -> dict[str, float]:
  """Measures processor seconds an image of each stage alone."""
  rng = np.random.default_rng(0)
  order = rng.integers(len(source), size=images).tolist()
  files = [source[index]["image"] for index in order]
  decoded = [transforms.decode_image(file, config.decoder) for file in files]
  cropped = [transforms.random_resized_crop(x, config, rng) for x in decoded]
  pixels = [np.asarray(image) for image in cropped]
  parts = range(0, images, batch_size)
  batch = {"image": np.stack(pixels[:batch_size])}
  mesh = make_mesh(MeshConfig())
  stages = {
    "read": lambda: [source[index] for index in order],
    "decode": lambda: [
      transforms.decode_image(file, config.decoder) for file in files
    ],
    "crop and resize": lambda: [
      transforms.random_resized_crop(image, config, rng) for image in decoded
    ],
    "RandAugment": lambda: [randaugment(x, config, rng) for x in cropped],
    "batch": lambda: [np.stack(pixels[i : i + batch_size]) for i in parts],
    "transfer": lambda: [
      jax.block_until_ready(shard_batch(batch, mesh)) for _ in parts
    ],
    "Pillow's decode and resize": lambda: [
      _by_pillow_alone(file, config, rng) for file in files
    ],
  }
  return {
    name: min(_processor_seconds(stage) for _ in range(ROUNDS)) / images
    for name, stage in stages.items()
  }


def _by_pillow_alone(file, config, rng):
  image = Image.open(io.BytesIO(file)).convert("RGB")
  return transforms.random_resized_crop(image, config, rng)


def _processor_seconds(call: Callable[[], Any]) -> float:
  start = time.process_time()
  call()
  return time.process_time() - start


def time_pipeline(
  source: Source, config: DataConfig, images: int, batch_size: int
) -> float:
  """Measures processor seconds an image of the pipeline, over all threads."""
  # One long round, because threads are amid a batch when it begins and ends.
  count = ROUNDS * max(1, images // batch_size)
  with train_batches(source, config, batch_size=batch_size, seed=0) as batches:

    def take(count: int):
      for _ in range(count):
        next(batches)

    take(config.prefetch + config.num_threads)  # Uses up the prefetched ones.
    return _processor_seconds(lambda: take(count)) / (count * batch_size)


def workers_speed(
  source: Source,
  config: DataConfig,
  images: int,
  batch_size: int,
  workers: int,
) -> float:
  """Measures images a second, by wall clock, with worker processes."""
  config = dataclasses.replace(config, num_workers=workers)
  # Enough batches for every worker to start and to use up its prefetched ones.
  ready = workers * (config.prefetch + 1)
  count = max(ready, images // batch_size)
  with train_batches(source, config, batch_size=batch_size, seed=0) as batches:
    for _ in range(ready):
      next(batches)
    start = time.perf_counter()
    for _ in range(count):
      next(batches)
    return count * batch_size / (time.perf_counter() - start)


def write_imagenet(
  data_dir: pathlib.Path, size: tuple[int, int], max_side: int | None = None
) -> None:
  """Prepares training files, which repeat after `DISTINCT`.

  Args:
    data_dir: the TFDS directory.
    size: width and height of the photographs.
    max_side: writes their copies of this `--max_side` instead.
  """
  files = [_photo_file(index, size) for index in range(DISTINCT)]
  if max_side:
    files = [shrink(file, max_side) for file in files]
  # No more than 512 MB.
  count = min(SYNTHETIC_IMAGES, 2**29 // len(files[0]))
  tree = data_dir / "tree"
  for split, images in (("train", count), ("val", 1)):
    (tree / split / "n00000000").mkdir(parents=True)
    for index in range(images):
      path = tree / split / "n00000000" / f"{split}_{index:08d}.JPEG"
      path.write_bytes(files[index % len(files)])
  with _silence():
    imagenet.prepare(tree, str(data_dir))
  shutil.rmtree(tree)


def _photo_file(index: int, size: tuple[int, int]) -> bytes:
  """Cuts an image out of a photograph that mirrors extend at its edges."""
  rng = np.random.default_rng(index)
  photo = load_sample_image(("china.jpg", "flower.jpg")[index % 2])
  rows, columns = (
    max(0, size[1 - axis] - photo.shape[axis]) for axis in range(2)
  )
  photo = np.pad(photo, [(0, rows), (0, columns), (0, 0)], mode="symmetric")
  top = rng.integers(photo.shape[0] - size[1] + 1)
  left = rng.integers(photo.shape[1] - size[0] + 1)
  cut = photo[top : top + size[1], left : left + size[0]]
  file = io.BytesIO()
  Image.fromarray(cut).save(file, "JPEG", quality=QUALITY)
  return file.getvalue()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
  """Hides the progress that TFDS prints."""
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stderr(nowhere),
    contextlib.redirect_stdout(nowhere),
  ):
    yield


if __name__ == "__main__":
  main()
