r"""Exports the model of a checkpoint to one file, ONNX or StableHLO.

    python -m spatial_mamba_jax.export runs/digits/checkpoints \
      digits.onnx --image_size=32
    python -m spatial_mamba_jax.export runs/digits/checkpoints \
      digits.stablehlo --image_size=32

The name of an ONNX file ends in .onnx. `export_onnx` says what the file
computes; `spatial_mamba_jax.export` shows how to run a StableHLO file.
"""

import argparse
import pathlib
import sys
from typing import Any

from spatial_mamba_jax.errors import (
  one_line,
  run_command,
  silence_threads,
  tell,
)
from spatial_mamba_jax.export import (
  check_destination,
  export_model,
  export_onnx,
)
from spatial_mamba_jax.export.network import ImageSize, Network
from spatial_mamba_jax.paths import local_path


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  options = _parse(arguments)
  mistakes = (
    *(ValueError, OSError, ImportError, MemoryError),
    NotImplementedError,
  )
  return run_command("export", lambda: _export(options), mistakes)


def _export(options: argparse.Namespace) -> None:
  out = local_path(options.out)
  is_onnx = out.suffix == ".onnx"
  # Before the checkpoint is read.
  check_destination(out, "onnx" if is_onnx else "flatbuffers")
  if is_onnx and options.image_size is None:
    raise ValueError("an ONNX file is for images of one size: --image_size=224")
  model = _load(options.checkpoint)
  write = _write_onnx if is_onnx else _write_stablehlo
  arrays = write(model, out, image_size=options.image_size, int8=options.int8)
  size = out.stat().st_size / 2**20
  tell(one_line(f"wrote {out}, {size:.1f} MiB: {arrays}"))


def _write_stablehlo(model: Network, out: pathlib.Path, **options: Any) -> str:
  """Returns what the program takes and returns."""
  exported = export_model(model, out, **options)
  (images,), results = exported.in_avals, exported.out_avals
  return (
    f"normalised images {images.str_short()} to"
    f" {', '.join(x.str_short() for x in results)},"
    f" for {', '.join(exported.platforms)}"
  )


def _write_onnx(model: Network, out: pathlib.Path, **options: Any) -> str:
  """Returns what the graph takes and returns."""
  graph = export_onnx(model, out, **options).graph
  (images,) = map(_described, graph.input)
  return f"normalised {images} to {', '.join(map(_described, graph.output))}"


def _described(value: Any) -> str:
  sizes = value.type.tensor_type.shape.dim
  shape = ",".join(x.dim_param or str(x.dim_value) for x in sizes)
  return f"{value.name} float32[{shape}]"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.export",
    description="Exports the model of a checkpoint to one file.",
  )
  parser.add_argument(
    "checkpoint",
    type=pathlib.Path,
    help="weights: a run's directory, a checkpoint, a .pth or .safetensors"
    " file, or a directory of save_pretrained",
  )
  parser.add_argument(
    "out",
    type=pathlib.Path,
    help="the file to write: ONNX if its name ends in .onnx, else StableHLO",
  )
  parser.add_argument(
    "--image_size",
    type=_image_size,
    default=224,
    help="pixels of a side, HxW, or any (StableHLO alone)"
    " (default: %(default)s)",
  )
  parser.add_argument(
    "--int8",
    action="store_true",
    help="multiply int8: weights by channel, activations measured in each call",
  )
  return parser.parse_args(arguments)


def _image_size(text: str) -> ImageSize:
  match [int(side) if side.isdecimal() else side for side in text.split("x")]:
    case [int(side)] if side:
      return side
    case [int(height), int(width)] if height and width:
      return height, width
    case ["any"]:
      return None
  raise argparse.ArgumentTypeError(f"must be N, HxW or any, not {text!r}")


def _load(path: pathlib.Path) -> Network:
  # Imported here, because it needs the packages of training.
  from spatial_mamba_jax.training.weights import load_model

  return load_model(path)


if __name__ == "__main__":
  silence_threads()
  sys.exit(main())
