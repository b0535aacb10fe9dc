"""Converts weights from one format to another.

    python -m spatial_mamba_jax.convert SRC DST

The content of SRC decides its format:
  FILE.pth (any suffix)  a checkpoint of the authors' trainer (model_ema, model)
                         or of another (state_dict_ema, state_dict, module, ...;
                         --key selects any other), or a dictionary of tensors
  FILE.safetensors       the authors' tensor names
  DIR                    a directory with model.safetensors or pytorch_model.bin
  a working directory of train.py (its best checkpoint), its checkpoints, or
  one checkpoint, e.g. runs/tiny/checkpoints/1251

The name of DST, which must not exist, decides its format:
  FILE.safetensors       the authors' tensor names and PyTorch's layout
  DIR/NUMBER             a checkpoint, for eval.py --checkpoint, e.g.
                         runs/released/checkpoints/0
  DIR                    a directory for smj.from_pretrained and the Hugging
                         Face hub: config.json, model.safetensors, README.md

The architecture is inferred from the tensors. Prefixes that wrappers add to
tensor names (module., _orig_mod., model., backbone., ...) are removed and
reported. A UPerNet of mmsegmentation is read with its heads; of other models
with a backbone, the backbone alone.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

from spatial_mamba_jax.convert.architecture import (
  abstract_model,
  with_head_bias,
)
from spatial_mamba_jax.convert.files import (
  Found,
  is_of_weights,
  read_file,
  written_whole,
)
from spatial_mamba_jax.convert.model_card import UNKNOWN, Provenance
from spatial_mamba_jax.convert.names import from_torch, to_torch
from spatial_mamba_jax.convert.pretrained import model_of, save_pretrained
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
from spatial_mamba_jax.models.backbone import Backbone, Classifier, Trunk
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.paths import local_path

# Exceptions of wrong paths, missing packages and malformed files.
MISTAKES = (ValueError, OSError, ImportError, MemoryError)


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status, 2 for a mistake."""
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
    help="convert the weights themselves, even if SRC has their moving average",
  )
  which.add_argument(
    "--key",
    help="convert the tensors below this key of SRC, e.g. model or state.model",
  )
  parser.add_argument(
    "--license",
    default=UNKNOWN.license,
    help="licence of the weights, for the model card (default: %(default)s)",
  )
  options = parser.parse_args(arguments)

  def run():
    report = convert(
      options.src,
      options.dst,
      raw=options.raw,
      key=options.key,
      license=options.license,
    )
    tell(one_line(report))

  return run_command("convert", run, MISTAKES)


def convert(
  src: pathlib.Path,
  dst: pathlib.Path,
  *,
  raw: bool = False,
  key: str | None = None,
  license: str = UNKNOWN.license,
) -> str:
  """Converts weights; the docstring of this module lists the formats.

  Args:
    src: the path to read.
    dst: the path to write. A failure leaves nothing there.
    raw: whether to prefer the weights themselves to their moving average.
    key: the key of the weights in a file; see `read_file`.
    license: the licence of the weights, for a model card.

  Returns:
    A message about the model and its origin.

  Raises:
    OSError: `src` cannot be read, or `dst` exists or cannot be written.
    ValueError: `src` is not a model, or the name of `dst` is wrong.
    ImportError: a package for these formats is missing.
  """
  src, dst = local_path(src), local_path(dst)
  _check_destination(dst)
  found = _read(src, raw, key)
  try:
    model = model_of(found)
  except ValueError as error:
    raise ValueError(f"{src}: {error}{found.origin()}") from error
  provenance = dataclasses.replace(
    found.trained.provenance, license=license, origin=f"`{src.name}`"
  )
  _write(model, dst, provenance)
  config, fields = model.config, flat_fields(model.config)
  report = f"{dst}: {type(model).__name__} of dims {config.dims}, depths"
  report += f" {config.depths}"
  if "d_state" in fields:
    report += f", d_state {fields['d_state']}"
  if not isinstance(model, Backbone):
    report += f", {config.num_classes} classes"
  if isinstance(model, Classifier):
    report += ", no bias in the head" * (model.head.bias is None)
  return report + found.origin()


def _check_destination(dst: pathlib.Path) -> None:
  if os.path.lexists(dst):
    raise FileExistsError(f"{dst} exists and is not overwritten")
  if not dst.name.isdecimal():
    import_safetensors()
  if dst.name == "checkpoints":
    raise ValueError(f"{dst}: name the checkpoint by its step, {dst / '0'}")
  if dst.name.isdecimal() and dst.name != str(int(dst.name)):
    raise ValueError(f"{dst}: write the step as {int(dst.name)}")
  if dst.suffix in (".pth", ".pt", ".bin", ".ckpt"):
    raise ValueError(
      f"{dst}: PyTorch's own format is not written; write"
      f" {dst.stem}.safetensors and read it with safetensors.torch.load_file"
    )


def _read(src: pathlib.Path, raw: bool, key: str | None) -> Found:
  if is_of_weights(src):
    return read_file(src, raw=raw, key=key)
  if key is not None:
    raise ValueError(f"{src} is not a file: --key is for files")
  # Imported here, because PyTorch's files do not need Orbax.
  from spatial_mamba_jax.training.weights import read_checkpoint

  return read_checkpoint(src, raw=raw)


def _write(
  model: Trunk | Segmentor, dst: pathlib.Path, provenance: Provenance
) -> None:
  if dst.suffix == ".safetensors":
    with written_whole(dst) as part:
      write_safetensors(part, to_torch(model))
  elif not dst.name.isdecimal():
    save_pretrained(model, dst, provenance=provenance)
  elif isinstance(model, Backbone):
    raise ValueError(
      f"{dst}: checkpoints are of classifiers and segmentors; write this"
      " backbone to a directory whose name is not a number, or to a"
      " .safetensors file"
    )
  else:
    from spatial_mamba_jax.models.pure import PureModel
    from spatial_mamba_jax.training.checkpoint import Checkpoints

    tensors = to_torch(model)
    if isinstance(model, Classifier):
      tensors = with_head_bias(tensors, model)
      model = abstract_model(model.config)
      from_torch(model, tensors)
    with written_whole(dst) as part:
      _check_room(part, sum(x.nbytes for x in tensors.values()))
      with Checkpoints(part.parent) as checkpoints:
        weights = PureModel.weights_of(model)
        checkpoints.save_weights(int(dst.name), weights)
        checkpoints.wait()


def _check_room(path: pathlib.Path, size: int) -> None:
  """Raises an OSError if the disk has no room for a file of `size` bytes.

  Orbax would fail in threads, which print their tracebacks.
  """
  try:
    with path.open("wb") as file:
      file.writelines(bytes(2**20) for _ in range(size // 2**20 + 1))
  finally:
    path.unlink(missing_ok=True)


if __name__ == "__main__":
  silence_threads()
  sys.exit(main())
