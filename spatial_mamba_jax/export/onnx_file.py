"""Exports models to ONNX files, for onnxruntime and other runtimes."""

import os
import tempfile
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import export

from spatial_mamba_jax.export.destination import check_destination, replace
from spatial_mamba_jax.export.network import (
  ImageSize,
  Network,
  check_network,
  without_kernels,
)
from spatial_mamba_jax.models.backbone import Backbone
from spatial_mamba_jax.paths import local_path

if TYPE_CHECKING:
  import onnx

# The name of the input.
IMAGES = "images"


def export_onnx(
  model: Network,
  path: str | os.PathLike[str],
  *,
  image_size: ImageSize = 224,
  int8: bool = False,
) -> "onnx.ModelProto":
  """Writes a model and its weights as ONNX, of standard operators alone.

  The file takes batches of any size and images of one size. Its input `images`
  is float32 [batch, H, W, in_channels], normalised. Its outputs are `logits`,
  [batch, K] of a classifier and [batch, H, W, K] of a segmentor, or
  `features_0`, `features_1`, ... of a backbone, [batch, Hi, Wi, Ci] of each
  stage in `out_indices`. The file's metadata has the mean and standard
  deviation of the images, and these names.

  Linear recurrences are ONNX's `Scan`, one token a step. `implementation` in
  the model's config is ignored.

  Args:
    model: from `create_model`, `create_backbone` or `create_segmentor`, in eval
      mode, with the dtype float32.
    path: the file to write; an existing file is replaced.
    image_size: the size of all images, H = W or (H, W); not None.
    int8: whether matrix products with weights multiply int8, by
      `onnxruntime.quantization`: weights have a scale for each output channel,
      activations one for each tensor, measured in each call.

  Returns:
    The file's content.

  Raises:
    ValueError: the model is in training mode or not float32, or `image_size` is
      wrong.
    NotImplementedError: the model computes something for which there is no
      rule; the message names it.
    ImportError: onnx is not installed, or onnxruntime for `int8`.
    OSError: the file cannot be written.
  """
  path = local_path(path)
  if image_size is None:
    raise ValueError("a model is exported to ONNX for images of one size")
  sides = check_network(model, image_size)
  dtype = jnp.dtype(model.config.dtype)
  if dtype != jnp.float32:
    raise ValueError(
      f"a model is exported to ONNX in float32, not {dtype}: create it with"
      ' dtype="float32"'
    )
  check_destination(path, "onnx")
  content = _converted(without_kernels(model), sides)
  if int8:
    content = _quantized(content)
  replace(path, content.SerializeToString())
  return content


def _converted(model: Network, sides: str) -> "onnx.ModelProto":
  # Imported here, because they need onnx.
  from onnx import helper

  from spatial_mamba_jax.export.onnx_graph import Graph, computed
  from spatial_mamba_jax.export.onnx_trace import convert

  config = model.config
  shape = export.symbolic_shape(f"b, {sides}, {config.in_channels}")
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  traced = jax.make_jaxpr(lambda images: model(images))(images)
  graph = Graph(IMAGES, shape[0])
  results = convert(
    graph, traced.jaxpr, traced.consts, [computed(IMAGES, shape)]
  )
  names = _output_names(model)
  outputs = []
  for name, x, aval in zip(names, results, traced.out_avals, strict=True):
    graph.copy(graph.full(x, aval.shape), name)
    outputs.append(graph.info(name, aval.shape, aval.dtype))
  content = graph.model(
    [graph.info(IMAGES, shape, jnp.float32)],
    outputs,
    producer_name="spatial_mamba_jax",
  )
  helper.set_model_props(content, _properties(config, names))
  return content


def _quantized(content: "onnx.ModelProto") -> "onnx.ModelProto":
  import onnx
  from onnxruntime import quantization

  with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "int8.onnx")
    quantization.quantize_dynamic(
      content,
      path,
      op_types_to_quantize=["MatMul"],
      per_channel=True,
      weight_type=quantization.QuantType.QInt8,
    )
    return onnx.load(path)


def _output_names(model):
  if isinstance(model, Backbone):
    return [f"features_{i}" for i in sorted(map(int, model.norms))]
  return ["logits"]


def _properties(config, names):
  """Returns what a user of the file must know, {key: value}."""
  properties = {
    "input": IMAGES,
    "input_layout": "NHWC",
    "outputs": ", ".join(names),
    "family": config.family.name,
    "mixer": config.mixer.name,
  }
  if config.in_channels == 3:
    properties |= {
      "channels": "RGB",
      "normalisation": "(pixels / 255 - mean) / std, pixels 0 to 255",
      "mean": ", ".join(map(str, config.preprocessing.mean)),
      "std": ", ".join(map(str, config.preprocessing.std)),
    }
  return properties
