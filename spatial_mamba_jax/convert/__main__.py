"""Turns weights of one kind into another.

    python -m spatial_mamba_jax.convert SRC DST

SRC is told by what it is:
  FILE.pth (any suffix)  of the authors' trainer (model_ema, model), of
                         mmdetection or mmsegmentation (state_dict, whose
                         backbone. is taken), or of tensors alone
  FILE.safetensors       with the authors' tensor names
  DIR/model.safetensors  or the directory that has it
  a working directory of train.py (its best checkpoint), its checkpoints, or
  one of these, runs/tiny/checkpoints/1251

DST, which must not exist, by its last name:
  FILE.safetensors       the authors' tensor names and PyTorch's layout
  DIR/NUMBER             a checkpoint, for eval.py --checkpoint, e.g.
                         runs/released/checkpoints/0
  DIR                    a directory for smj.from_pretrained and the Hugging
                         Face hub: config.json, model.safetensors, README.md

The architecture is inferred from the tensors.
"""

import argparse
import logging
import os
import pathlib
import sys

from spatial_mamba_jax.convert.architecture import infer_model
from spatial_mamba_jax.convert.files import (
  Found,
  is_of_weights,
  read_file,
  write_safetensors,
  written_whole,
)
from spatial_mamba_jax.convert.names import from_torch, to_torch
from spatial_mamba_jax.convert.pretrained import save_pretrained
from spatial_mamba_jax.models.spatial_mamba import SpatialMamba, Trunk


def main(arguments: list[str] | None = None) -> int:
  """Converts as the arguments say.

  Returns:
    The exit status, 2 for a mistake.
  """
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("src", metavar="SRC", type=pathlib.Path)
  parser.add_argument("dst", metavar="DST", type=pathlib.Path)
  parser.add_argument(
    "--raw",
    action="store_true",
    help="take the trained weights where SRC has their moving average, too",
  )
  options = parser.parse_args(arguments)
  # Orbax warns of what is so on purpose.
  logging.getLogger("absl").setLevel(logging.ERROR)
  try:
    print(convert(options.src, options.dst, raw=options.raw))
  except (ImportError, OSError, ValueError) as error:
    message = " ".join(str(error).split())
    print(f"convert: {message}", file=sys.stderr)
    return 2
  return 0


def convert(src: pathlib.Path, dst: pathlib.Path, *, raw: bool = False) -> str:
  """Writes the weights of `src` to `dst`; the module says of what kinds.

  Args:
    src: what to read.
    dst: what to write, whole or not at all.
    raw: whether to take the weights that have a moving average themselves.

  Returns:
    What was done, in words.

  Raises:
    OSError, ValueError: `src` cannot be read or is no model, or `dst` exists
      or cannot be written.
    ImportError: a package is missing for these kinds.
  """
  src, dst = src.absolute(), dst.absolute()
  _check_destination(dst)
  found = _read(src, raw)
  try:
    model = infer_model(found.state_dict)
    from_torch(model, found.state_dict)
  except ValueError as error:
    raise ValueError(f"{src}: {error}") from error
  _write(model, dst)
  config = model.config
  return (
    f"{dst}: {type(model).__name__} of dims {config.dims}, depths"
    f" {config.depths}, d_state {config.d_state}"
    + f", {config.num_classes} classes" * isinstance(model, SpatialMamba)
    + f", from {found.key!r}" * (found.key is not None)
    + f"; left out {len(found.left_out)} tensors that are not the backbone's"
    f" ({', '.join(found.left_out[:3])}, ...)" * bool(found.left_out)
  )


def _check_destination(dst: pathlib.Path) -> None:
  if os.path.lexists(dst):
    raise FileExistsError(f"{dst} exists, and is left as it is")
  if dst.name == "checkpoints":
    raise ValueError(f"{dst}: a checkpoint is named by its step, {dst / '0'}")
  if dst.name.isdecimal() and dst.name != str(int(dst.name)):
    raise ValueError(f"{dst}: a step is written {int(dst.name)}")
  if dst.suffix in (".pth", ".pt", ".bin", ".ckpt"):
    raise ValueError(
      f"{dst}: PyTorch's own files are not written; PyTorch reads {dst.stem}"
      ".safetensors with safetensors.torch.load_file"
    )


def _read(src: pathlib.Path, raw: bool) -> Found:
  if is_of_weights(src):
    return read_file(src, raw=raw)
  # Here, because PyTorch's files need no orbax.
  from spatial_mamba_jax.training.weights import read_checkpoint

  return read_checkpoint(src, raw=raw)


def _write(model: Trunk, dst: pathlib.Path) -> None:
  if dst.suffix == ".safetensors":
    with written_whole(dst) as part:
      write_safetensors(part, to_torch(model))
  elif not dst.name.isdecimal():
    save_pretrained(model, dst)
  elif not isinstance(model, SpatialMamba):
    raise ValueError(
      f"{dst}: checkpoints are of classifiers; write this backbone to a"
      " directory with another name than a number, or to a .safetensors"
    )
  else:
    from spatial_mamba_jax.training.checkpoint import Checkpoints
    from spatial_mamba_jax.training.state import PureModel

    with written_whole(dst) as part, Checkpoints(part.parent) as checkpoints:
      checkpoints.save_weights(int(dst.name), PureModel.weights_of(model))
      checkpoints.wait()


if __name__ == "__main__":
  sys.exit(main())
