r"""Classifies images by a trained network.

    python -m spatial_mamba_jax.classify --checkpoint=runs/digits \
      photo.jpg folder/ --top=5 --json --heat=heat.png

A line has an image, its most probable classes and their probabilities; with
--json, each line is a JSON object. --heat draws which parts of the images speak
for their first class. It needs `pip install ".[train]"`.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from spatial_mamba_kernels.typing import Array, Float

from spatial_mamba_jax.errors import (
  UserError,
  one_line,
  run_command,
  say,
  silence_threads,
  tell,
)
from spatial_mamba_jax.models.backbone import Classifier
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.transform import create_transform

# Images of a call: small, so that the first results come soon.
BATCH_SIZE = 8
# Most images in a picture of heat maps.
_MOST_DRAWN = 24
_COLUMNS = 6


class Prediction(NamedTuple):
  """The most probable classes of an image.

  Attributes:
    path: the image's file.
    labels: [top], the classes, the most probable first.
    names: [top], their names; the labels as text if the names are unknown.
    probabilities: [top].
    pixels: uint8 [S, S, 3], the part of the image that the network sees.
    heat: [h, w], see `class_activations`.
  """

  path: str
  labels: tuple[int, ...]
  names: tuple[str, ...]
  probabilities: tuple[float, ...]
  pixels: np.ndarray
  heat: np.ndarray


class Unreadable(NamedTuple):
  """An image that could not be read, and why."""

  path: str
  error: str


def class_activations(
  model: Classifier, images: Float[Array, "B H W 3"]
) -> tuple[Float[Array, "B K"], Float[Array, "B h w"]]:
  """Computes probabilities, and each token's share in the first class's logit.

  The head is linear in the mean of the tokens, so the logit of a class is the
  mean of what the head returns for each token (class activation maps, arXiv
  1512.04150), and nothing is approximated.
  """
  features = model.forward_features(images)
  of_tokens = model.head(features)
  logits = jnp.mean(of_tokens, axis=(1, 2))
  first = jnp.argmax(logits, axis=-1)
  heat = jnp.take_along_axis(of_tokens, first[:, None, None, None], axis=-1)
  return jax.nn.softmax(logits), heat[..., 0]


def classify(
  model: Classifier, files: Sequence[str], *, top: int = 5
) -> Iterator[Prediction | Unreadable]:
  """Classifies image files, in their order.

  Args:
    model: in eval mode.
    files: the paths.
    top: classes of a prediction; all if there are fewer.
  """
  transform = create_transform(model)
  run = nnx.jit(class_activations)
  names = model.config.class_names
  size = transform.preprocessing.image_size
  for start in range(0, len(files), BATCH_SIZE):
    chunk = files[start : start + BATCH_SIZE]
    # Always a full batch, so that one compiled program serves all.
    pixels, errors = np.zeros((BATCH_SIZE, size, size, 3), np.uint8), {}
    for i, path in enumerate(chunk):
      try:
        pixels[i] = transform.pixels(path)[0]
      except UserError as error:
        errors[path] = one_line(error)
    results = run(model, transform.normalise(pixels))
    for path, shown, scores, heat in zip(
      chunk, pixels, *map(np.asarray, results), strict=False
    ):
      if path in errors:
        yield Unreadable(path, errors[path])
        continue
      labels = tuple(map(int, np.argsort(-scores, kind="stable")[:top]))
      yield Prediction(
        path,
        labels,
        tuple(names[i] if names else str(i) for i in labels),
        tuple(float(scores[i]) for i in labels),
        shown,
        heat,
      )


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status, 1 if an image is unreadable."""
  options = _parse(arguments)
  mistakes = (ValueError, OSError, ImportError, MemoryError)
  return run_command("classify", lambda: _run(options), mistakes)


def _run(options: argparse.Namespace) -> int:
  from spatial_mamba_jax.visualize.command import output

  heat = output(options.heat, "--heat") if options.heat else None
  files = list(_files(options.images))
  model = _load(options.checkpoint)
  drawn: list[Prediction] = []
  status = 0
  for result in classify(model, files, top=options.top):
    if isinstance(result, Unreadable):
      status = 1
    elif len(drawn) < _MOST_DRAWN:
      drawn.append(result)
    _print(result, options.json)
  if heat and drawn:
    _draw(drawn, heat)
    left = len(files) - len(drawn)
    say(f"wrote {heat}" + f", without {left} images" * bool(left))
  return status


def _files(paths: Sequence[str]) -> Iterator[str]:
  from spatial_mamba_jax.data.image_folder import list_images

  for text in paths:
    path = local_path(text)
    if not path.is_dir():
      if not path.exists():
        raise UserError(f"{text} does not exist")
      yield text
      continue
    found, _ = list_images(path)
    if not found:
      raise UserError(f"{text} has no images")
    yield from found


def _load(text: str) -> Classifier:
  if os.path.exists(local_path(text, "--checkpoint")):
    from spatial_mamba_jax.training.weights import load_model

    model = load_model(pathlib.Path(text))
  else:
    from spatial_mamba_jax.convert.pretrained import from_pretrained

    model = from_pretrained(text)
  if not isinstance(model, Classifier):
    raise UserError(
      f"{text} holds a {type(model).__name__}, which does not classify images"
    )
  return model


def _print(result: Prediction | Unreadable, as_json: bool) -> None:
  if isinstance(result, Unreadable):
    if as_json:
      tell(json.dumps(result._asdict()))
    say(result.error)
    return
  classes = zip(result.labels, result.names, result.probabilities, strict=True)
  if as_json:
    rows = [
      {"label": label, "name": name, "probability": probability}
      for label, name, probability in classes
    ]
    tell(json.dumps({"path": result.path, "classes": rows}))
    return
  cells = [f"{probability:6.2%} {name}" for _, name, probability in classes]
  tell(one_line(f"{result.path}: ") + " " + ",  ".join(map(one_line, cells)))


def _draw(drawn: Sequence[Prediction], out: pathlib.Path) -> None:
  from spatial_mamba_jax.training.digests import write_whole
  from spatial_mamba_jax.visualize.figures import draw_heat, picture

  figure = draw_heat(
    [
      (
        result.pixels,
        result.heat,
        f"{pathlib.Path(result.path).name}\n"
        f"{result.names[0]} {result.probabilities[0]:.1%}",
      )
      for result in drawn
    ],
    columns=_COLUMNS,
  )
  write_whole(out, picture(figure, out.suffix))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m spatial_mamba_jax.classify",
    description="Classifies images by a trained network.",
  )
  parser.add_argument(
    "images", nargs="+", help="image files, and folders of image files"
  )
  parser.add_argument(
    "--checkpoint",
    required=True,
    help="trained weights: a run's directory, a checkpoint, a .pth or"
    " .safetensors file, a directory of save_pretrained, or a repository of the"
    " Hugging Face hub, org/name",
  )
  parser.add_argument(
    "--top",
    type=_positive,
    default=5,
    help="classes of an image (default: %(default)s)",
  )
  parser.add_argument(
    "--json", action="store_true", help="print a JSON object for each image"
  )
  parser.add_argument(
    "--heat",
    help="draw which parts of the images speak for their first class, into this"
    " .png or .svg file",
  )
  return parser.parse_args(arguments)


def _positive(text: str) -> int:
  if not text.isdecimal() or not 1 <= int(text) < 2**31:
    raise argparse.ArgumentTypeError(f"must be 1 or more, not {text!r}")
  return int(text)


if __name__ == "__main__":
  silence_threads()
  sys.exit(main())
