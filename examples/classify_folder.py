r"""The classes of all images in a folder, as a CSV.

    python examples/classify_folder.py FOLDER OUT.csv \
      [--checkpoint=runs/digits/checkpoints --image_size=32]

A row has a path, the class that scores highest and its probability, or what is
wrong with the file. Without a checkpoint the weights are random.
"""

import argparse
import csv
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import spatial_mamba_jax as smj
from spatial_mamba_jax.data import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  DataConfig,
  transforms,
)
from spatial_mamba_jax.data.image_folder import EXTENSIONS
from spatial_mamba_jax.training.weights import load_model

BATCH_SIZE = 8


@nnx.jit
def probabilities(model: smj.SpatialMamba, pixels: jax.Array) -> jax.Array:
  """[B, H, W, 3] bytes to [B, K]."""
  mean, std = jnp.array(IMAGENET_MEAN), jnp.array(IMAGENET_STD)
  return jax.nn.softmax(model((pixels / 255 - mean) / std))


def classify(
  model: smj.SpatialMamba, paths: list[pathlib.Path], config: DataConfig
) -> list[tuple]:
  """(path, class, probability, error) of each, up to a batch of them."""
  # As many each time, so that one program serves all.
  pixels = np.zeros((BATCH_SIZE, config.image_size, config.image_size, 3))
  errors = {}
  for i, path in enumerate(paths):
    try:
      image = transforms.decode_image(path.read_bytes())
      pixels[i] = transforms.transform_for_evaluation(image, config)
    except Exception as error:  # Decoders raise whatever they like.
      errors[path] = f"unreadable: {error}"
  scores = np.asarray(probabilities(model, jnp.asarray(pixels, jnp.uint8)))
  return [
    (path, "", "", errors[path])
    if path in errors
    else (path, score.argmax(), f"{score.max():.4f}", "")
    for path, score in zip(paths, scores, strict=False)
  ]


def main() -> None:
  """Classifies as the command line says."""
  parser = argparse.ArgumentParser(description="Classifies images to a CSV.")
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--checkpoint", type=pathlib.Path)
  parser.add_argument("--image_size", type=int, default=224)
  options = parser.parse_args()
  files = sorted(options.folder.rglob("*"))
  paths = [path for path in files if path.suffix.lower() in EXTENSIONS]
  if not paths:
    parser.error(f"{options.folder} has no images: {' '.join(EXTENSIONS)}")
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0))
  if options.checkpoint:
    try:
      model = load_model(options.checkpoint)
    except ValueError as error:
      parser.error(str(error))
  if not isinstance(model, smj.SpatialMamba):
    parser.error(f"{options.checkpoint} is a backbone, and has no classes")
  config = DataConfig(image_size=options.image_size)
  with options.out.open("w", newline="") as file, tqdm(total=len(paths)) as bar:
    table = csv.writer(file)
    table.writerow(("path", "class", "probability", "error"))
    for start in range(0, len(paths), BATCH_SIZE):
      rows = classify(model, paths[start : start + BATCH_SIZE], config)
      table.writerows(rows)
      bar.update(len(rows))
      for path, *_, error in rows:
        if error:
          bar.write(f"{path}: {error}")


if __name__ == "__main__":
  main()
