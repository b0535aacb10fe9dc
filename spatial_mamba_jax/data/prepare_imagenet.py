"""Turns a tree of ImageNet files into the TFDS data set `imagenet2012`.

The tree holds `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`:

  python -m spatial_mamba_jax.data.prepare_imagenet \
    --image_folder=DIR --data_dir=DIR

It needs as much free space as the tree, but neither TensorFlow nor a network.
`--max_side=512` writes a smaller copy: larger images are resized. Instead of
`--image_folder`, `--from_data_dir=DIR` reads a data set that is already
prepared.
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
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--image_folder",
    help="directory with train/<wnid>/*.JPEG and val/<wnid>/*.JPEG",
  )
  source.add_argument(
    "--from_data_dir",
    help="TFDS directory with a prepared imagenet2012",
  )
  parser.add_argument(
    "--data_dir",
    default="",
    help="TFDS directory to write to (default: $TFDS_DATA_DIR, else "
    "~/tensorflow_datasets)",
  )
  parser.add_argument(
    "--max_side",
    type=int,
    help="resize images whose longer side has more pixels (default: none)",
  )
  options = parser.parse_args(arguments)
  return run_command("prepare_imagenet", lambda: _prepare(options))


def _prepare(options: argparse.Namespace) -> None:
  # Imported here, so that a missing package is reported in one line.
  from spatial_mamba_jax.data import imagenet
  from spatial_mamba_jax.paths import local_path

  if options.from_data_dir is not None:
    read = imagenet.read_prepared
    root = local_path(options.from_data_dir, "--from_data_dir")
  else:
    read = imagenet.read_tree
    root = local_path(options.image_folder, "--image_folder")
  directory = imagenet.prepare(
    root, options.data_dir, read=read, max_side=options.max_side
  )
  tell(f"prepared {directory}")


if __name__ == "__main__":
  sys.exit(main())
