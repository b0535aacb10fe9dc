"""Exports models to single files that run without this project.

    smj.export_onnx(model, "tiny.onnx")  # for onnxruntime and others
    smj.export_model(model, "tiny.stablehlo")  # for JAX

The packages jax and flatbuffers suffice to run a StableHLO file on RGB images:

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

import os

import jax
from jax import export

from spatial_mamba_jax.export.destination import check_destination, replace
from spatial_mamba_jax.export.int8 import Quantized, quantize
from spatial_mamba_jax.export.network import (
  Network,
  check_network,
  without_kernels,
)
from spatial_mamba_jax.export.onnx_file import export_onnx
from spatial_mamba_jax.paths import local_path

__all__ = [
  "PLATFORMS",
  "Quantized",
  "check_destination",
  "export_model",
  "export_onnx",
  "quantize",
]

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
  model: Network,
  path: str | os.PathLike[str],
  *,
  image_size: int | tuple[int, int] | None = 224,
  int8: bool = False,
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
    int8: whether to multiply int8, as `smj.quantize` does. The weights then
      take a quarter of the file.

  Returns:
    The exported program.

  Raises:
    ValueError: the model is in training mode, or `image_size` is wrong.
    ImportError: flatbuffers is not installed.
    OSError: the file cannot be written.
  """
  path = local_path(path)
  sides = check_network(model, image_size)
  channels = model.config.in_channels
  shape = export.symbolic_shape(f"b, {sides}, {channels}")
  images = jax.ShapeDtypeStruct(shape, model.config.param_dtype)
  check_destination(path)
  portable = without_kernels(model)
  function = quantize(model).traced if int8 else lambda images: portable(images)
  exported = export.export(jax.jit(function), platforms=PLATFORMS)(images)
  replace(path, exported.serialize())
  return exported
