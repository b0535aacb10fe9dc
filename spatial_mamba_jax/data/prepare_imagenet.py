"""Turns a tree of ImageNet files into the TFDS data set `imagenet2012`.

The tree holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`:

  python -m spatial_mamba_jax.data.prepare_imagenet \
    --image_folder=DIR --data_dir=DIR

It needs as much free space as the tree, but neither TensorFlow nor a network.
"""

import argparse
import pathlib
import sys

from spatial_mamba_jax.data import imagenet
from spatial_mamba_jax.data.config import DataError


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    description="Turns a tree of ImageNet files into the TFDS data set."
  )
  parser.add_argument(
    "--image_folder",
    type=pathlib.Path,
    required=True,
    help="directory with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
  )
  parser.add_argument(
    "--data_dir",
    default="",
    help="TFDS directory to write to (default: $TFDS_DATA_DIR, else "
    "~/tensorflow_datasets)",
  )
  options = parser.parse_args(arguments)
  try:
    directory = imagenet.prepare(options.image_folder, options.data_dir)
  except DataError as error:
    print(f"prepare_imagenet: {error}", file=sys.stderr)
    return 2
  print(f"prepared {directory}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
