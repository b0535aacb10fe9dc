r"""Exports the model of a checkpoint to one file that runs with JAX.

    python -m spatial_mamba_jax.export runs/digits/checkpoints \
      digits.stablehlo --image_size=32

`spatial_mamba_jax.export` shows how to run the file.
"""

import argparse
import pathlib
import sys

from spatial_mamba_jax.errors import (
  one_line,
  run_command,
  silence_threads,
  tell,
)
from spatial_mamba_jax.export import check_destination, export_model
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.paths import local_path


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  options = _parse(arguments)
  mistakes = (ValueError, OSError, ImportError, MemoryError)
  return run_command("export", lambda: _export(options), mistakes)


def _export(options: argparse.Namespace) -> None:
  out = local_path(options.out)
  check_destination(out)  # Before the checkpoint is read.
  model = _load(options.checkpoint)
  exported = export_model(model, out, image_size=options.image_size)
  (images,), results = exported.in_avals, exported.out_avals
  tell(
    one_line(
      f"wrote {out}, {out.stat().st_size / 2**20:.1f} MiB:"
      f" normalised images {images.str_short()} to"
      f" {', '.join(x.str_short() for x in results)},"
      f" for {', '.join(exported.platforms)}"
    )
  )


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.export",
    description="Exports the model of a checkpoint to one StableHLO file.",
  )
  parser.add_argument(
    "checkpoint",
    type=pathlib.Path,
    help="weights: a run's directory, a checkpoint, a .pth or .safetensors"
    " file, or a directory of save_pretrained",
  )
  parser.add_argument("out", type=pathlib.Path, help="the file to write")
  parser.add_argument(
    "--image_size",
    type=_image_size,
    default=224,
    help="pixels of a side, HxW, or any (default: %(default)s)",
  )
  return parser.parse_args(arguments)


def _image_size(text: str) -> int | tuple[int, int] | None:
  match [int(side) if side.isdecimal() else side for side in text.split("x")]:
    case [int(side)] if side:
      return side
    case [int(height), int(width)] if height and width:
      return height, width
    case ["any"]:
      return None
  raise argparse.ArgumentTypeError(f"must be N, HxW or any, not {text!r}")


def _load(path: pathlib.Path) -> Trunk | Segmentor:
  # Imported here, because it needs the packages of training.
  from spatial_mamba_jax.training.weights import load_model

  return load_model(path)


if __name__ == "__main__":
  silence_threads()
  sys.exit(main())
