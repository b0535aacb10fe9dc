"""UPerNet as benchmarks run it: in evaluation, in training, and its backbone.

The recipe is that of `configs/ade20k_upernet_tiny.py`. Work is counted as in
`network`; the resizing of logits is left out.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from spatial_mamba_kernels.typing import Array

import configs.ade20k_upernet_tiny
from benchmarks import network
from spatial_mamba_jax.models.flops import TRAINING_FACTOR, count_flops
from spatial_mamba_jax.models.segmentor import Segmentor
from spatial_mamba_jax.tasks.normalisation import normalise
from spatial_mamba_jax.training.config import TrainConfig

# Of the backbone alone, without heads; of evaluation, from the pixels to the
# label maps at the size of the images; and of training.
PROGRAMS = ("backbone", "inference", "train")


def experiment(model: str, *, batch_size: int, dtype: str) -> TrainConfig:
  """The recipe for ADE20K.

  Args:
    model: a preset, of the backbone.
    batch_size: images of a call, an even number.
    dtype: of activations.
  """
  config = configs.ade20k_upernet_tiny.get_config()
  config.model.name, config.model.dtype = model, dtype
  config.batch_size = batch_size
  return config


def evaluation(
  name: str, config: TrainConfig, shape: tuple[int, int]
) -> tuple[Callable[..., Any], Any, dict[str, jax.ShapeDtypeStruct]]:
  """(state, batch) -> results, not yet jitted, and the shapes of both.

  Args:
    name: "backbone" or "inference".
    config: the experiment.
    shape: height and width of the images, in pixels.
  """
  task = config.create_task()
  model = nnx.eval_shape(lambda: task.network(rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)

  def features(state, batch):
    model = nnx.merge(graphdef, state)
    assert isinstance(model, Segmentor)
    return model.backbone(normalise(batch["image_0"]))

  def label_maps(state, batch):
    return task.predict(nnx.merge(graphdef, state), batch)["predicted"]

  size = config.batch_size
  batch = {
    "image_0": jax.ShapeDtypeStruct((size, *shape, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((size, *shape), jnp.int16),
    "size": jax.ShapeDtypeStruct((size, 2), jnp.int32),
  }
  functions = {"backbone": features, "inference": label_maps}
  return functions[name], state, batch


def compile_program(
  name: str, config: TrainConfig, shape: tuple[int, int]
) -> network.Compiled:
  """Compiles a program.

  Args:
    name: one of `PROGRAMS`.
    config: the experiment.
    shape: height and width of the images; training has square crops.
  """
  start = time.perf_counter()
  if name == "train":
    compiled, prepare = network.compile_train(config, min(shape))
  else:
    program = evaluation(name, config, shape)
    compiled, prepare = network.compile_forward(*program)
  seconds = time.perf_counter() - start
  size = config.batch_size
  flops = size * _image_flops(name, config, shape)
  return network.Compiled(compiled, prepare, seconds, size, flops)


# {program: what of the model is counted}.
_COUNTED: dict[str, Callable[[Segmentor, Array], Any]] = {
  "backbone": lambda model, images: model.backbone(images),
  "inference": Segmentor.decode_logits,
  "train": Segmentor.head_logits,
}


def _image_flops(name, config, shape):
  model = nnx.eval_shape(lambda: config.create_task().network(rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  image = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
  flops = count_flops(
    lambda state, image: _COUNTED[name](nnx.merge(graphdef, state), image),
    state,
    image,
  )
  return TRAINING_FACTOR * flops if name == "train" else flops
