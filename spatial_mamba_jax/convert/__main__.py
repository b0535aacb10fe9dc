"""Turns weights of one kind into another.

    python -m spatial_mamba_jax.convert SRC DST

SRC is told by what it is:
  FILE.pth (any suffix)  of the authors' trainer (model_ema, model), of another
                         (state_dict_ema, state_dict, module, ...; --key takes
                         what this does not), or of tensors alone
  FILE.safetensors       with the authors' tensor names
  DIR/model.safetensors  or the directory that has it, or pytorch_model.bin
  a working directory of train.py (its best checkpoint), its checkpoints, or
  one of these, runs/tiny/checkpoints/1251

DST, which must not exist, by its last name:
  FILE.safetensors       the authors' tensor names and PyTorch's layout
  DIR/NUMBER             a checkpoint, for eval.py --checkpoint, e.g.
                         runs/released/checkpoints/0
  DIR                    a directory for smj.from_pretrained and the Hugging
                         Face hub: config.json, model.safetensors, README.md

The architecture is inferred from the tensors. What wrappers put before their
names (module., _orig_mod., model., backbone., ...) is left out, and said.
"""

import argparse
import os
import pathlib
import sys

from spatial_mamba_jax.convert.architecture import (
  abstract_model,
  infer_model,
  with_head_bias,
)
from spatial_mamba_jax.convert.files import (
  Found,
  is_of_weights,
  read_file,
  written_whole,
)
from spatial_mamba_jax.convert.names import from_torch, to_torch
from spatial_mamba_jax.convert.pretrained import save_pretrained
from spatial_mamba_jax.convert.pretrained_config import flat_fields
from spatial_mamba_jax.convert.safetensors_file import (
  import_safetensors,
  write_safetensors,
)
from spatial_mamba_jax.errors import (
  one_line,
  run_command,
  silence_threads,
  tell,
)
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.spatial_mamba import SpatialMamba
from spatial_mamba_jax.paths import local_path

# What may be wrong with paths, files and packages, and with what files claim.
MISTAKES = (ValueError, OSError, ImportError, MemoryError)


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
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    "--raw",
    action="store_true",
    help="take the trained weights where SRC has their moving average, too",
  )
  which.add_argument(
    "--key",
    help="take what is below this key of SRC, e.g. model or state.model",
  )
  options = parser.parse_args(arguments)

  def run():
    said = convert(options.src, options.dst, raw=options.raw, key=options.key)
    tell(one_line(said))

  return run_command("convert", run, MISTAKES)


def convert(
  src: pathlib.Path,
  dst: pathlib.Path,
  *,
  raw: bool = False,
  key: str | None = None,
) -> str:
  """Writes the weights of `src` to `dst`; the module says of what kinds.

  Args:
    src: what to read.
    dst: what to write, whole or not at all.
    raw: whether to take the weights that have a moving average themselves.
    key: which weights of a file to take, as `read_file` says.

  Returns:
    What was done, in words.

  Raises:
    OSError: `src` cannot be read, or `dst` exists or cannot be written.
    ValueError: `src` is no model, or `dst` no name for one.
    ImportError: a package is missing for these kinds.
  """
  src, dst = local_path(src), local_path(dst)
  _check_destination(dst)
  found = _read(src, raw, key)
  try:
    model = infer_model(found.state_dict)
    from_torch(model, found.state_dict)
  except ValueError as error:
    raise ValueError(f"{src}: {error}{found.origin()}") from error
  _write(model, dst)
  config = model.config
  said = f"{dst}: {type(model).__name__} of dims {config.dims}, depths"
  said += f" {config.depths}, d_state {flat_fields(config)['d_state']}"
  if isinstance(model, SpatialMamba):
    said += f", {config.num_classes} classes"
    said += ", no bias in the head" * (model.head.bias is None)
  return said + found.origin()


def _check_destination(dst: pathlib.Path) -> None:
  if os.path.lexists(dst):
    raise FileExistsError(f"{dst} exists, and is left as it is")
  if not dst.name.isdecimal():
    import_safetensors()
  if dst.name == "checkpoints":
    raise ValueError(f"{dst}: a checkpoint is named by its step, {dst / '0'}")
  if dst.name.isdecimal() and dst.name != str(int(dst.name)):
    raise ValueError(f"{dst}: a step is written {int(dst.name)}")
  if dst.suffix in (".pth", ".pt", ".bin", ".ckpt"):
    raise ValueError(
      f"{dst}: PyTorch's own files are not written; PyTorch reads {dst.stem}"
      ".safetensors with safetensors.torch.load_file"
    )


def _read(src: pathlib.Path, raw: bool, key: str | None) -> Found:
  if is_of_weights(src):
    return read_file(src, raw=raw, key=key)
  if key is not None:
    raise ValueError(f"{src} is no file: --key is for files")
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
    from spatial_mamba_jax.models.pure import PureModel
    from spatial_mamba_jax.training.checkpoint import Checkpoints

    tensors = with_head_bias(to_torch(model))
    classifier = abstract_model(model.config)
    assert isinstance(classifier, SpatialMamba)
    from_torch(classifier, tensors)
    with written_whole(dst) as part:
      _check_room(part, sum(x.nbytes for x in tensors.values()))
      with Checkpoints(part.parent) as checkpoints:
        weights = PureModel.weights_of(classifier)
        checkpoints.save_weights(int(dst.name), weights)
        checkpoints.wait()


def _check_room(path: pathlib.Path, size: int) -> None:
  """Raises an OSError if the disk does not take a file of some bytes.

  Orbax finds out in threads that fill the terminal with tracebacks.
  """
  try:
    with path.open("wb") as file:
      file.writelines(bytes(2**20) for _ in range(size // 2**20 + 1))
  finally:
    path.unlink(missing_ok=True)


if __name__ == "__main__":
  silence_threads()
  sys.exit(main())
