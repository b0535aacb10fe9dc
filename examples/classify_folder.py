r"""Classifies all images in a folder, and writes a CSV.

    python examples/classify_folder.py FOLDER OUT.csv \
      [--checkpoint=runs/digits/checkpoints --image_size=32]

A row has a path, the most probable class and its probability, or the reason why
the file is unreadable. Without a checkpoint the weights are random.
"""

import argparse
import csv
import fcntl
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import spatial_mamba_jax as smj
from spatial_mamba_jax import data, errors
from spatial_mamba_jax.data import decoding, image_folder, transforms
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.weights import load_model

BATCH_SIZE = 8


@nnx.jit
def probabilities(model: smj.Classifier, pixels: jax.Array) -> jax.Array:
  """Maps bytes [B, H, W, 3] to probabilities [B, K]."""
  mean, std = jnp.array(data.IMAGENET_MEAN), jnp.array(data.IMAGENET_STD)
  return jax.nn.softmax(model((pixels / 255 - mean) / std))


def classify(model: smj.Classifier, files: list[str], size: int):
  """Returns (path, class, probability, error) for up to BATCH_SIZE files."""
  # Always a full batch, so that one compiled program serves all.
  pixels = np.zeros((BATCH_SIZE, size, size, 3), np.uint8)
  preprocessing = data.DataConfig(image_size=size).preprocessing
  wrong = {}
  for i, path in enumerate(files):
    try:
      image = decoding.decode_image(decoding.read_image(pathlib.Path(path)))
      pixels[i] = transforms.transform_for_evaluation(image, preprocessing)
    except Exception as error:  # Decoders raise any type.
      wrong[path] = f"unreadable: {errors.one_line(error)}"
  scores = np.asarray(probabilities(model, jnp.asarray(pixels)))
  return [
    (path, "", "", wrong[path])
    if path in wrong
    else (path, score.argmax(), f"{score.max():.4f}", "")
    for path, score in zip(files, scores, strict=False)
  ]


def main() -> None:
  """Classifies as the command line says."""
  parser = argparse.ArgumentParser(description="Classifies images to a CSV.")
  for name in ("folder", "out", "--checkpoint"):
    parser.add_argument(name)
  parser.add_argument("--image_size", type=int, default=224)
  options = parser.parse_args()
  size = options.image_size
  data.DataConfig(image_size=size).validate()
  folder = local_path(options.folder, "folder")
  files = image_folder.list_images(folder)[0] if folder.is_dir() else []
  if not files:
    raise errors.UserError(f"{folder} has no images")
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0))
  if options.checkpoint:
    model = load_model(local_path(options.checkpoint, "--checkpoint"))
  if not isinstance(model, smj.Classifier):
    raise errors.UserError(f"{options.checkpoint} has no classes")
  out = local_path(options.out, "out")
  # Paths may not be UTF-8: `surrogateescape` writes their bytes.
  with out.open("a", -1, "utf-8", "surrogateescape", newline="") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(f"another run is writing {out}") from None
    if out.is_file():
      file.truncate(0)
    table = csv.writer(file)
    table.writerow(("path", "class", "probability", "error"))
    for start in tqdm(range(0, len(files), BATCH_SIZE)):
      rows = classify(model, files[start : start + BATCH_SIZE], size)
      table.writerows(rows)
      file.flush()  # A crash loses no earlier rows.
      for path, *_, error in rows:
        if error:
          tqdm.write(f"{errors.one_line(path)}: {error}")


if __name__ == "__main__":
  if status := errors.run_command("classify_folder", main):
    sys.exit(status)
