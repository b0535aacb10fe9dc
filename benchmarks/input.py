"""Times the input pipeline: `python -m benchmarks.input`.

It times each stage alone on one thread, then the pipeline as training runs it,
in processor seconds an image, so that other work on the machine counts little;
it takes the best of several rounds. The lower bound is Pillow's decoding and
resizing alone, of the same crops of the same files. Last, it times the pipeline
with one worker process a core, by wall clock.

Without --data_dir, it reads noise of ImageNet's average size (500 x 375 pixels,
some 110 kB), prepared as TFDS's imagenet2012.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

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
from spatial_mamba_jax.training.config import MeshConfig
from spatial_mamba_jax.training.sharding import make_mesh, shard_batch

ROUNDS = 3
# Images of the synthetic dataset. With fewer, grain's shuffle would dominate.
SYNTHETIC_IMAGES = 1024
DISTINCT = 64


def main() -> None:
  """Measures as the command line says."""
  arguments = _parse()
  with contextlib.ExitStack() as stack:
    data_dir = arguments.data_dir
    if not data_dir:
      data_dir = stack.enter_context(tempfile.TemporaryDirectory())
      write_imagenet(pathlib.Path(data_dir), SYNTHETIC_IMAGES)
    config = DataConfig(
      name="imagenet2012",
      data_dir=data_dir,
      image_size=arguments.image_size,
      decoder=arguments.decoder,
    )
    measured = measure(config, arguments.images, arguments.batch_size)
  if arguments.json:
    print(json.dumps({**vars(arguments), **measured}))
    return
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
  return {
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
  count = max(1, images // batch_size)
  with train_batches(source, config, batch_size=batch_size, seed=0) as batches:

    def take():
      for _ in range(count):
        next(batches)

    take()  # Threads fill their buffers.
    seconds = min(_processor_seconds(take) for _ in range(ROUNDS))
  return seconds / (count * batch_size)


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


def write_imagenet(data_dir: pathlib.Path, count: int) -> None:
  """Prepares `count` training files of ImageNet's average size."""
  rng = np.random.default_rng(0)
  files = [_noise_file(rng) for _ in range(min(DISTINCT, count))]
  tree = data_dir / "tree"
  for split, images in (("train", count), ("val", 1)):
    (tree / split / "n00000000").mkdir(parents=True)
    for index in range(images):
      path = tree / split / "n00000000" / f"{split}_{index:08d}.JPEG"
      path.write_bytes(files[index % len(files)])
  # TFDS prints its progress.
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stderr(nowhere),
    contextlib.redirect_stdout(nowhere),
  ):
    imagenet.prepare(tree, str(data_dir))
  shutil.rmtree(tree)


def _noise_file(rng: np.random.Generator) -> bytes:
  coarse = rng.integers(0, 256, (24, 32, 3), np.uint8)
  smooth = Image.fromarray(coarse).resize((500, 375))
  noisy = np.asarray(smooth) + rng.normal(0, 16, (375, 500, 3))
  file = io.BytesIO()
  image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
  image.save(file, "JPEG", quality=90)
  return file.getvalue()


if __name__ == "__main__":
  main()
