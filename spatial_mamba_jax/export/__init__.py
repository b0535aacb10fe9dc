"""Exports models to single files that run with JAX, without this project.

    smj.export_model(model, "tiny.stablehlo")

The packages jax and flatbuffers suffice to run the file on RGB images:

    import jax.numpy as jnp
    from jax import export

    with open("tiny.stablehlo", "rb") as file:
      model = export.deserialize(bytearray(file.read()))
    mean = jnp.array([0.485, 0.456, 0.406])
    std = jnp.array([0.229, 0.224, 0.225])
    images = (pixels / 255 - mean) / std  # pixels [B, 224, 224, 3], 0 .. 255
    logits = model.call(images)  # [B, 1000]

The mean and standard deviation are ImageNet's. `jax.jit(model.call)` compiles
once.
"""

import errno
import os
import pathlib
from contextlib import suppress
from typing import Any

import jax
from flax import nnx
from jax import export

from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.paths import local_path

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
  model: Trunk | Segmentor,
  path: str | os.PathLike[str],
  *,
  image_size: int | tuple[int, int] | None = 224,
) -> export.Exported:
  """Writes a model and its weights as StableHLO, by `jax.export`.

  The file has one program for CPUs, NVIDIA GPUs and TPUs and for any batch
  size, and one copy of the weights: 101 MiB for tiny. JAX reads it for at least
  six months. The program takes normalised images [B, H, W, in_channels] and
  returns what the model returns; `in_avals` and `out_avals` give the types.

  The program has no Pallas kernels, because these are compiled for one batch
  size, and GPU kernels for one GPU. `implementation` in the model's config is
  ignored.

  Args:
    model: from `create_model`, `create_backbone` or `create_segmentor`, in eval
      mode.
    path: the file to write; an existing file is replaced.
    image_size: the size of all images, H = W or (H, W); None for any size. With
      None, GPUs and TPUs scan token by token, which is slow there. A segmentor
      and the mixers linear_attention, plain_mamba and mhs need a size.

  Returns:
    The exported program.

  Raises:
    ValueError: the model is in training mode, or `image_size` is wrong.
    ImportError: flatbuffers is not installed.
    OSError: the file cannot be written.
  """
  path = local_path(path)
  if not model.deterministic:
    raise ValueError("export is for inference: call model.eval() first")
  if isinstance(model, Segmentor) and image_size is None:
    raise ValueError("a segmentor is exported for images of one size")
  if model.config.mixer.needs_size and image_size is None:
    raise ValueError(
      f"a network with the mixer {model.config.mixer.name} is exported for"
      " images of one size"
    )
  channels = model.config.in_channels
  sides = _height_and_width(image_size)
  shape = export.symbolic_shape(f"b, {sides}, {channels}")
  images = jax.ShapeDtypeStruct(shape, model.config.param_dtype)
  check_destination(path)
  portable = _without_kernels(model)
  exported = export.export(
    jax.jit(lambda images: portable(images)), platforms=PLATFORMS
  )(images)
  _replace(path, exported.serialize())
  return exported


def check_destination(path: pathlib.Path) -> None:
  """Checks that a file can be written, before a model is traced.

  Raises:
    ImportError: flatbuffers is not installed.
    OSError: the file cannot be written.
  """
  try:
    import flatbuffers  # noqa: F401
  except ImportError as error:
    raise ImportError(
      'flatbuffers is missing: pip install ".[export]"'
    ) from error
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  if path.exists() and not path.is_file():
    raise OSError(f"{path} is not a file and is not overwritten")
  _replace(path, None)


def _height_and_width(image_size: int | tuple[int, int] | None) -> str:
  if image_size is None:
    return "h, w"
  pair = image_size if isinstance(image_size, tuple) else (image_size,) * 2
  if len(pair) != 2 or min(pair) < 1:
    raise ValueError(
      f"image_size must be H, (H, W) or None, in pixels: got {image_size!r}"
    )
  return "{}, {}".format(*pair)


def _without_kernels(model: nnx.Module) -> Any:
  """Returns a copy of the model with no kernel as its `implementation`."""
  model = nnx.clone(model)
  for _, module in nnx.iter_graph(model):
    if getattr(module, "implementation", None) is not None:
      module.implementation = None
  return model


def _replace(path: pathlib.Path, content: bytearray | None) -> None:
  """Replaces a file atomically; with None, only checks that it could."""
  partial = path.with_name(f".{path.name[:50]}.partial")
  try:
    partial.write_bytes(content or b"")
    if content is not None:
      partial.replace(path)
  except OSError as error:
    error.filename = str(path)  # Not the partial file, which is removed.
    raise
  finally:
    with suppress(OSError):
      partial.unlink()
