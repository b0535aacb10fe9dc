"""Turns a tree of ImageNet files into the TFDS data set `imagenet2012`.

The tree holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`:

  python -m spatial_mamba_jax.data.prepare_imagenet \
    --image_folder=DIR --data_dir=DIR

It needs as much free space as the tree, but neither TensorFlow nor a network.
"""

import argparse
import sys

from spatial_mamba_jax.errors import run_command, tell

_NAME = "python -m spatial_mamba_jax.data.prepare_imagenet"


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog=_NAME,
    description="Turns a tree of ImageNet files into the TFDS data set.",
  )
  parser.add_argument(
    "--image_folder",
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
  return run_command(
    "prepare_imagenet", lambda: _prepare(options.image_folder, options.data_dir)
  )


def _prepare(image_folder: str, data_dir: str) -> None:
  # Imported here, so that a missing package is reported in one line.
  from spatial_mamba_jax.data import imagenet
  from spatial_mamba_jax.paths import local_path

  root = local_path(image_folder, "--image_folder")
  tell(f"prepared {imagenet.prepare(root, data_dir)}")


if __name__ == "__main__":
  sys.exit(main())
