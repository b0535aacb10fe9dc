"""The command line of `python -m spatial_mamba_jax.visualize`."""

import argparse
import os
import pathlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx

from spatial_mamba_jax.create import create_model
from spatial_mamba_jax.errors import (
  UserError,
  run_command,
  silence_threads,
  tell,
)
from spatial_mamba_jax.models import list_models
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.mixers import MIXERS, LinearMixer
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.digests import write_whole
from spatial_mamba_jax.training.weights import load_model
from spatial_mamba_jax.visualize import figures, images, maps

if TYPE_CHECKING:
  import matplotlib.figure

# Output tokens of `mixing`: row and column, as shares of the image.
_POSITIONS = ((0.5, 0.5), (0.25, 0.75), (0.8, 0.2))
_LONGEST_SIDE = 2**12  # In pixels.


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  options = _parse(arguments)
  mistakes = (ValueError, OSError, ImportError, MemoryError)
  return run_command("visualize", lambda: _visualize(options), mistakes)


def _visualize(options: argparse.Namespace) -> None:
  out = output(options.out or f"{options.kind}.png")
  draw = {
    "erf": _receptive_fields,
    "states": _states,
    "mixing": _mixing,
    "mixers": _mixers,
  }[options.kind]
  write_whole(out, figures.picture(draw(options), out.suffix))
  tell(f"wrote {out}")


def output(text: str, flag: str = "--out") -> pathlib.Path:
  """Returns the path of a picture; refuses one that cannot be written."""
  out = local_path(text, flag)
  if out.suffix.lower() not in (".png", ".svg"):
    raise UserError(f"{flag}={text} must end in .png or .svg")
  if out.is_dir() or not os.access(out.parent, os.W_OK):
    raise UserError(
      f"{flag}={text} cannot be written: give a file in a directory that exists"
    )
  return out


def _receptive_fields(options) -> "matplotlib.figure.Figure":
  pixels = images.read_images(options.image, options.image_size)
  model = _model(options)
  models = {"random weights": model}
  if options.weights:
    models = {"random weights": _random(model, options.seed), "trained": model}
  inputs = _inputs(model, *pixels)
  return figures.draw_receptive_fields(
    {name: maps.receptive_field(x, inputs) for name, x in models.items()},
    f"Effective receptive field, {options.weights or options.model}",
  )


def _states(options) -> "matplotlib.figure.Figure":
  pixels, model, image = _one_image(options)
  return figures.draw_states(
    pixels,
    maps.state_maps(model, image, stage=options.stage, block=options.block),
    f"States h of {_place(options)}",
  )


def _mixing(options) -> "matplotlib.figure.Figure":
  pixels, model, image = _one_image(options)
  tokens, rows = maps.mixing_maps(
    model, image, _POSITIONS, stage=options.stage, block=options.block
  )
  title = f"Rows of the mixing matrix M of {_place(options)}"
  return figures.draw_mixing(pixels, tokens, rows, title)


def _one_image(options):
  """Returns the pixels of the first image, the model and its input."""
  pixels, *_ = images.read_images(options.image, options.image_size)
  model = _model(options)
  (image,) = _inputs(model, pixels)
  return pixels, model, image


def _mixers(options) -> "matplotlib.figure.Figure":
  pixels = images.read_images(options.image, options.image_size)
  sheet = {}
  for name, mixer in MIXERS.items():
    model = create_model(
      options.model, mixer=mixer, rngs=nnx.Rngs(options.seed)
    )
    inputs = _inputs(model, *pixels)
    row = None
    block: Any = model.stages[0].blocks[0]
    if isinstance(block.mixer, LinearMixer):
      (token,), (weights,) = maps.mixing_maps(
        model, inputs[0], [(0.5, 0.5)], stage=options.stage, block=options.block
      )
      row = token, weights
    sheet[name] = maps.receptive_field(model, inputs), row
  title = f"{options.model} with each mixer, random weights"
  return figures.draw_mixers(sheet, title)


def _model(options) -> Trunk:
  if options.weights:
    silence_threads()  # Those of the packages that read checkpoints.
    model = load_model(options.weights)
    return model.backbone if isinstance(model, Segmentor) else model
  return create_model(options.model, rngs=nnx.Rngs(options.seed))


def _random(model: Trunk, seed: int) -> Trunk:
  """Returns a network of the same architecture with initial weights."""
  return type(model)(model.config, rngs=nnx.Rngs(seed))


def _inputs(model, *pixels):
  channels = model.config.in_channels
  return jnp.stack([images.normalise(x, channels) for x in pixels])


def _place(options) -> str:
  network = options.weights or f"{options.model}, random weights"
  return f"block {options.block} of stage {options.stage}, {network}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.visualize",
    description="Draws what a network looks at.",
  )
  kinds = parser.add_subparsers(dest="kind", required=True)
  erf = kinds.add_parser("erf", help="effective receptive field")
  states = kinds.add_parser("states", help="states before and after fusion")
  mixing = kinds.add_parser("mixing", help="rows of the mixing matrix")
  sheet = kinds.add_parser("mixers", help="all mixers, with random weights")
  for kind in (erf, states, mixing, sheet):
    network = kind.add_mutually_exclusive_group()
    network.add_argument(
      "--model",
      default="spatial_mamba_tiny",
      choices=list_models(),
      help="a network with random weights (default: %(default)s)",
    )
    if kind is not sheet:
      network.add_argument(
        "--weights",
        type=pathlib.Path,
        help="trained weights: a run's directory, a checkpoint, a .pth or"
        " .safetensors file, or a directory of save_pretrained",
      )
    kind.add_argument(
      "--seed", type=_number(0), default=0, help="of the random weights"
    )
    is_average = kind in (erf, sheet)
    kind.add_argument(
      "--image",
      type=pathlib.Path,
      nargs="+" if is_average else 1,
      default=[],
      help="image files, or two photographs of scikit-learn"
      if is_average
      else "an image file, or a photograph of scikit-learn",
    )
    kind.add_argument(
      "--image_size",
      type=_number(1, _LONGEST_SIDE),
      default=224,
      help="pixels of a side of the image's centre (default: %(default)s)",
    )
    kind.add_argument(
      "--out",
      default=None,
      help="the .png or .svg to write (default: KIND.png)",
    )
  for kind in (states, mixing, sheet):
    kind.add_argument("--stage", type=_number(0), default=0)
    kind.add_argument("--block", type=_number(0), default=0)
  return parser.parse_args(arguments)


def _number(least: int, most: int = 2**31 - 1):
  def parse(text):
    if not text.isdecimal() or not least <= int(text) <= most:
      raise argparse.ArgumentTypeError(
        f"must be a number from {least} to {most}, not {text!r}"
      )
    return int(text)

  return parse
