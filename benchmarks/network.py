"""The networks as benchmarks run them: inference, and the real training step.

The work counted is the model's multiply-adds (2 FLOP each; three times the
forward's for a training step), whatever the implementation.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import spatial_mamba_jax as smj
from benchmarks import timing
from spatial_mamba_jax.data.config import IMAGENET_IMAGES
from spatial_mamba_jax.models.flops import TRAINING_FACTOR, count_flops
from spatial_mamba_jax.models.mixers.base import MixerConfig
from spatial_mamba_jax.models.mixers.selective import dt_rank
from spatial_mamba_jax.models.mixers.structure_aware import StructureAwareConfig
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import ModelSection, TrainConfig
from spatial_mamba_jax.training.program import Program, make_program
from spatial_mamba_jax.training.sharding import make_mesh

PROGRAMS = ("inference", "train")
# Implementations of the mixer for which the layers have no kernels either.
_NO_KERNELS = ("xla", "sequential", "associative")


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Of one program.

  Attributes:
    images_per_second: the batch over the time of a call.
    spread: see `timing.Timing`.
    matmul_share: achieved FLOP/s over the matmul rate of this process.
    peak_bytes: arguments, results and temporaries, as the compiler plans them.
  """

  images_per_second: float
  spread: float
  matmul_share: float
  peak_bytes: int


def experiment(
  model: str,
  *,
  batch_size: int,
  dtype: str,
  implementation: str = "",
  mixer: MixerConfig | None = None,
) -> TrainConfig:
  """The published recipe's first quarter, before MESA begins.

  Args:
    model: a preset.
    batch_size: images of a step.
    dtype: of activations.
    implementation: of the structure-aware mixer; empty for the best.
    mixer: the token mixer; None for the structure-aware one.
  """
  if mixer is None:
    mixer = StructureAwareConfig(implementation=implementation or None)
  return TrainConfig(
    task=ClassificationConfig(num_classes=1000),
    model=ModelSection(
      name=model,
      drop_path_rate=0.2,
      dtype=dtype,
      mixer=mixer,
      layer_implementation="xla" if implementation in _NO_KERNELS else None,
    ),
    batch_size=batch_size,
    length="300 epochs",
    mesa_weight=0.0,
  )


def training_program(config: TrainConfig, mesh: Mesh | None = None) -> Program:
  """What trains on ImageNet; by default on JAX's first device."""
  if mesh is None:
    mesh = make_mesh(config.mesh, jax.devices()[:1])
  return make_program(config, mesh, train_examples=IMAGENET_IMAGES)


def inference(config: TrainConfig) -> tuple[Callable[..., Any], Any]:
  """(state, images) -> logits, not yet jitted, and the shapes of its state."""
  architecture = config.model.build()
  model = nnx.eval_shape(
    lambda: architecture.family.classifier(architecture, rngs=nnx.Rngs(0))
  )
  graphdef, state = nnx.split(model)
  return lambda state, images: nnx.merge(graphdef, state)(images), state


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program, whose arguments are not made yet.

  Attributes:
    compiled: by JAX.
    prepare: makes its arguments; returns what calls it.
    compile_seconds: tracing, lowering and compiling.
    batch_size: of a call, in images.
    flops: of a call.
  """

  compiled: jax.stages.Compiled
  prepare: Callable[[], Callable[[], Any]]
  compile_seconds: float
  batch_size: int
  flops: float


def compile_program(name: str, config: TrainConfig, size: int) -> Compiled:
  """Compiles "inference" or the "train" step.

  Args:
    name: one of `PROGRAMS`.
    config: the experiment.
    size: of the images, in pixels a side.
  """
  start = time.perf_counter()
  compiled, prepare = _COMPILE[name](config, size)
  seconds = time.perf_counter() - start
  flops = config.batch_size * image_flops(config, size)
  if name == "train":
    flops *= TRAINING_FACTOR
  return Compiled(compiled, prepare, seconds, config.batch_size, flops)


def image_flops(config: TrainConfig, size: int) -> float:
  """FLOP of the forward pass of one image, with any mixer."""
  function, state = inference(config)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  return count_flops(function, state, image)


def measure(program: Compiled, rate: float) -> Measurement:
  """Times a program; `rate` is that of matrix products, in FLOP/s."""
  time_of_call = timing.time_calls(program.prepare())
  memory = program.compiled.memory_analysis()
  assert memory is not None
  return Measurement(
    images_per_second=program.batch_size / time_of_call.seconds,
    spread=time_of_call.spread,
    matmul_share=program.flops / time_of_call.seconds / rate,
    peak_bytes=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes,
  )


def _compile_inference(config, size):
  function, state = inference(config)
  shape = (config.batch_size, size, size, 3)
  images = jax.ShapeDtypeStruct(shape, jnp.float32)
  return compile_forward(function, state, images)


def compile_forward(
  function: Callable[[Any, Any], Any], state: Any, batch: Any
) -> tuple[jax.stages.Compiled, Callable[[], Callable[[], Any]]]:
  """Compiles (state, batch) -> results for random arrays of these shapes.

  Returns:
    The program; and what makes its arguments and returns what calls it.
  """
  compiled = jax.jit(function).lower(state, batch).compile()

  def prepare():
    # Positive, as variances are, and not all the same, which is multiplied with
    # less power, and so sooner.
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
      lambda x: jnp.asarray(rng.uniform(0.01, 0.1, x.shape), x.dtype), state
    )
    return partial(compiled, weights, jax.tree.map(_random, batch))

  return compiled, prepare


def _random(like):
  key = jax.random.key(0)
  if jnp.issubdtype(like.dtype, jnp.floating):
    return jax.random.normal(key, like.shape, like.dtype)
  # From 1 on, because some are sizes.
  return jax.random.randint(key, like.shape, 1, 100, like.dtype)


def compile_train(
  config: TrainConfig, size: int
) -> tuple[jax.stages.Compiled, Callable[[], Callable[[], Any]]]:
  """Compiles the step for images of this size; see `compile_forward`."""
  config.data.image_size = size
  program = training_program(config)
  shapes = program.state_shapes, program.batch_shapes
  compiled = program.train_step.lower(*shapes).compile()

  def batch():
    shapes = program.batch_shapes
    image, label = shapes["image"], shapes["label"]
    labels = jnp.arange(label.size) % 10  # Every task here has more classes.
    made = {
      "image": jax.random.bits(jax.random.key(0), image.shape, jnp.uint8),
      "label": labels.reshape(label.shape).astype(label.dtype),
      "size": jnp.full((image.shape[0], 2), size),
    }
    return {name: made[name] for name in shapes}

  def prepare():
    state = program.fresh_state()
    images = jax.device_put(batch(), program.batch_shapes["image"].sharding)

    def call():
      nonlocal state
      state = compiled(state, images)
      return state

    return call

  return compiled, prepare


_COMPILE = {"inference": _compile_inference, "train": compile_train}


# Numbers that a block moves, of each in its input. Forward: convolution,
# residual and LayerNorm 3; projections 5; convolution and SiLU 4; x_proj 2; the
# SSM with dt_proj 4; norm and gate 6; out_proj with its residual 4; the second
# convolution 3; the MLP 11.
BLOCK_FORWARD = 42
# Backward, of each product once for what it read and once for its weights: the
# MLP 24; each convolution with LayerNorm and residual 4; out_proj 6; norm and
# gate 10; the SSM with dt_proj 6; x_proj 6; convolution and SiLU 6; projections
# 10. Elementwise work is done again when it is read.
BLOCK_BACKWARD = 76


def forward_bytes(config: smj.ModelConfig, size: int) -> int:
  """What inference must move for an image, with all fused that can be.

  Activations in bfloat16, weights left out. DownSampling is 8 times as wide as
  a block's input.
  """
  blocks, rest = _numbers_moved(config, size)
  return 2 * (BLOCK_FORWARD * blocks + rest)


def training_bytes(config: smj.ModelConfig, size: int) -> int:
  """What a training step must move for an image, as for `forward_bytes`.

  What is not a block is products for the most part, each three times.
  """
  blocks, rest = _numbers_moved(config, size)
  return 2 * ((BLOCK_FORWARD + BLOCK_BACKWARD) * blocks + 3 * rest)


def _numbers_moved(config, size):
  """In the inputs of all blocks; and moved forward by all that is no block."""
  half = -(-size // 2)
  side = -(-half // 2)
  dim = config.dims[0]
  image, stem = 3 * size**2, half**2 * (dim // 2)
  wide = side**2 * 4 * dim
  blocks, rest = 0, 2 * image + 7 * stem + 2 * wide + side**2 * dim
  for i, (dim, depth) in enumerate(
    zip(config.dims, config.depths, strict=True)
  ):
    blocks += depth * side**2 * dim
    if i + 1 < len(config.dims):
      wide = 4 * config.dims[i + 1]
      rest += side**2 * (dim + 2 * wide)
      side = -(-side // 2)
      rest += side**2 * (2 * wide + config.dims[i + 1])
  return blocks, rest


def forward_flops(config: smj.ModelConfig, size: int) -> float:
  """FLOP of one image, twice the multiply-adds (4.42 GMAC for tiny at 224).

  The paper has 4.43 for tiny; it may count the scan's exponentials.
  """
  half = -(-size // 2)
  side = -(-half // 2)
  dim, mixer = config.dims[0], config.mixer
  assert isinstance(mixer, StructureAwareConfig)
  macs = half**2 * (9 * 3 * (dim // 2) + 2 * 9 * (dim // 2) ** 2)
  macs += side**2 * (9 * (dim // 2) * 4 * dim + 4 * dim * dim)
  for i, (dim, depth) in enumerate(
    zip(config.dims, config.depths, strict=True)
  ):
    inner, rank = mixer.expand * dim, dt_rank(dim)
    block = 3 * dim * inner + inner * (2 * rank + 2 * mixer.d_state)
    block += 2 * int(config.mlp_ratio * dim) * dim
    # Depthwise convolutions; decay, drive and observation of the states, their
    # fusion by 27 taps; the skip connection.
    block += 2 * 9 * dim + 9 * inner + (3 + 27) * inner * mixer.d_state + inner
    macs += side**2 * depth * block
    if i + 1 < len(config.dims):
      wide, dim_out = 4 * config.dims[i + 1], config.dims[i + 1]
      macs += side**2 * dim * wide
      side = -(-side // 2)
      macs += side**2 * wide * (9 + dim_out)
  return 2.0 * (macs + config.dims[-1] * config.num_classes)
