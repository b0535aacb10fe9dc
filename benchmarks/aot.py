"""Compiles one program for an accelerator that is not there, and describes it.

    python -m benchmarks.aot kernel structure_aware_ssm backward \
      --target v5e:2x2 --shape 128 56 56 128 1
    python -m benchmarks.aot kernel selective_scan forward --target H200
    python -m benchmarks.aot step --model tiny --target v5e:16x16
    python -m benchmarks.aot step --model tiny --target H200:4
    python -m benchmarks.aot step --target H200 --without mlp
    python -m benchmarks.aot segmentor --target H200 --batch-size 1
    python -m benchmarks.aot segmentor --train --batch-size 16 --concatenated
    python -m benchmarks.aot image --target v5e:2x4 --size 8192

It prints one line of JSON. Needed are libtpu for TPUs, and for GPUs JAX's CUDA
plugin and a ptxas (`pip install ".[train,aot]"`). A compiler that aborts takes
its process along: compile one program in each.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from spatial_mamba_kernels import IMPLEMENTATIONS, PLATFORMS
from spatial_mamba_kernels.case import Sizes
from spatial_mamba_kernels.cases import CASES, by_name
from spatial_mamba_kernels.dispatch import Kernel
from spatial_mamba_kernels.sharding import ROWS_AXIS

from benchmarks import gpu_code, network, tpu_code
from benchmarks import segmentor as segmentors
from spatial_mamba_jax.forecast import collectives, hlo, topology
from spatial_mamba_jax.models import SpatialMambaBackbone, norms
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.training.config import MeshConfig
from spatial_mamba_jax.training.sharding import make_mesh, replicated

CUSTOM_CALLS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}


def main() -> None:
  """Compiles as the command line says."""
  print(json.dumps(compile_program()))


def compile_program(
  command: Sequence[str] | None = None,
) -> dict[str, Any]:
  """Compiles one program, once in a process.

  Args:
    command: the command line's arguments; None: those of this process.

  Returns:
    What the command prints.

  Raises:
    SystemExit: an argument is wrong, or nothing here compiles for the target.
  """
  arguments = _parse(command)
  with tempfile.TemporaryDirectory() as dump:
    # Before the compilers are loaded, which is with the first topology.
    topology.use_compilers()
    if arguments.optimization_level:
      jax.config.update("jax_optimization_level", arguments.optimization_level)
    if arguments.program == "kernel":
      os.environ.update(gpu_code.dump_to(dump))
      if arguments.cost:
        os.environ.update(tpu_code.dump_to(dump))
    programs = {
      "kernel": kernel,
      "inference": inference,
      "step": step,
      "segmentor": segmentor,
      "image": image,
    }
    run = programs[arguments.program]
    with (
      topology.as_default_device(arguments.target),
      without_kernels(getattr(arguments, "without", ())),
    ):
      try:
        return run(arguments, dump)
      except NotImplementedError as error:
        sys.exit(f"{arguments.target}: {error}")


@contextlib.contextmanager
def without_kernels(operators: Sequence[str]) -> Iterator[None]:
  """Leaves operators to XLA in the programs that are traced meanwhile.

  Args:
    operators: names of cases.
  """
  with contextlib.ExitStack() as patches:
    for name in operators:
      operator = by_name(name).operator
      patches.enter_context(mock.patch.object(operator, "kernels", {}))
    yield


def kernel(arguments: argparse.Namespace, dump: str) -> dict[str, Any]:
  """An operator's forward or backward kernels on one device.

  Returns:
    What `_compile` does; `compulsory_bytes`, of the operator's arguments and
    result, and backward of their cotangents; and

    for a TPU, of the one kernel alone, `vmem_bytes`; and where the cost is
    asked for, `moved_bytes` between HBM and VMEM; `step_tokens`, of 128
    channels each, that a step of the grid computes, and what
    `tpu_code.count_bundles` says of it;

    for a GPU `programs`: what `gpu_code.kernels` says of each kernel, and
    `loop_tokens`, of 128 channels, that a run of its loop computes (the MLP's:
    of some hidden units).
  """
  platform = topology.platform_of(arguments.target)
  sharding = NamedSharding(_mesh(arguments.target, 1), PartitionSpec())

  def placed(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  function, operands = program(
    arguments.op,
    arguments.direction,
    arguments.shape,
    arguments.dtype,
    platform,
  )
  operands = jax.tree.map(placed, operands)
  record, text = _compile(jax.jit(function), operands, platform)
  arrays = operands[0]
  passes = kernel_of(arguments.op, platform).passes
  forward = partial(passes.forward, save=False)
  compulsory = _bytes((arrays, jax.eval_shape(forward, arrays)))
  if arguments.direction == "backward":
    compulsory += _bytes(arrays)
  record["compulsory_bytes"] = compulsory
  if platform == "cuda":
    tokens = by_name(arguments.op).loop_tokens(arrays)
    programs = [
      program | {"loop_tokens": tokens[program["name"]]}
      for program in gpu_code.kernels(dump)
    ]
    return {**record, "programs": programs}
  (call,) = re.findall(r'custom_call_target="tpu_custom_call".*', text)
  vmem = re.search(r'used_scoped_memory_configs.*?"size":"(\d+)"', call)
  assert vmem is not None
  record["vmem_bytes"] = int(vmem[1])
  if arguments.cost:
    record["moved_bytes"] = tpu_code.moved_bytes(function, operands)
    record["step_tokens"] = _step_tokens(arguments, operands[0])
    record |= tpu_code.bundles(dump, arguments.op)
  return record


def _step_tokens(arguments, arrays):
  """Of 128 channels, that a step of a TPU kernel's grid computes."""
  cut = kernel_of(arguments.op, "tpu").plan(arrays)
  width = by_name(arguments.op).tpu_row(Sizes(*arguments.shape))
  return cut.group * width * -(-cut.block // 128)


def kernel_of(op: str, platform: str) -> Kernel:
  """Returns an operator's kernel for a platform, "tpu" or "cuda".

  Raises:
    NotImplementedError: there is none.
  """
  for name, kernel in by_name(op).operator.kernels.items():
    if PLATFORMS[name] == platform:
      return kernel
  raise NotImplementedError(f"{op} has no kernel")


def program(
  op: str,
  direction: str,
  shape: tuple[int, ...],
  dtype: str,
  platform: str = "tpu",
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """An operator's forward pass, saving, or backward pass, and its arguments.

  Args:
    op: the name of a case.
    direction: "forward" or "backward".
    shape: B, H, W, D, N; of a mixer, also where the operator is the MLP.
    dtype: of what has a number or more a pixel, but for states, in float32.
    platform: "tpu" or "cuda".
  """
  passes = kernel_of(op, platform).passes
  arrays = tuple(by_name(op).shapes(Sizes(*shape), dtype).values())
  forward = partial(passes.forward, save=True)
  if direction == "forward":
    return forward, (arrays,)
  result, *saved = jax.eval_shape(forward, arrays)
  if op == "selective_scan":
    saved = [result]
  return passes.backward, (arrays, tuple(saved), result)


def inference(arguments: argparse.Namespace, dump: str) -> dict[str, Any]:
  """A model's logits on one device."""
  del dump
  config = network.experiment(
    f"spatial_mamba_{arguments.model}",
    batch_size=arguments.batch_size,
    dtype="bfloat16",
    implementation=arguments.implementation,
  )
  config.model.depths = tuple(arguments.depths)
  function, state = network.inference(config)
  images = jax.ShapeDtypeStruct((arguments.batch_size, 224, 224, 3), "float32")
  sharding = NamedSharding(_mesh(arguments.target, 1), PartitionSpec())
  operands = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    (state, images),
  )
  platform = topology.platform_of(arguments.target)
  record, text = _compile(jax.jit(function), operands, platform)
  _write_text(arguments, text)
  return record


def _write_text(arguments, text):
  if arguments.text:
    with open(arguments.text, "w") as file:
      file.write(text)


def step(arguments: argparse.Namespace, dump: str) -> dict[str, Any]:
  """A training step of one of the ImageNet experiments, without MESA."""
  del dump
  mesh = _mesh(arguments.target, replica=arguments.replica, fsdp=arguments.fsdp)
  config = network.experiment(
    f"spatial_mamba_{arguments.model}",
    batch_size=arguments.batch_size * mesh.size,
    dtype="bfloat16",
    implementation=arguments.implementation,
  )
  config.evaluation_batch_size = config.batch_size
  config.model.depths = tuple(arguments.depths)
  program = network.training_program(config, mesh)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    record, text = _compile(
      program.train_step,
      (program.state_shapes, program.batch_shapes),
      topology.platform_of(arguments.target),
    )
  _write_text(arguments, text)
  return record


def segmentor(arguments: argparse.Namespace, dump: str) -> dict[str, Any]:
  """UPerNet's label maps of 512 x 2048 pixels on one device, or its training.

  The step has crops of 512 x 512. `--concatenated` convolves concatenated maps,
  as mmsegmentation does.
  """
  del dump
  mesh = _mesh(arguments.target, 1)
  config = segmentors.experiment(
    f"spatial_mamba_{arguments.model}",
    batch_size=arguments.batch_size,
    dtype="bfloat16",
  )
  if arguments.train:
    program = network.training_program(config, mesh)
    jitted = program.train_step
    operands = program.state_shapes, program.batch_shapes
  else:
    function, *operands = segmentors.evaluation(
      "inference", config, (512, 2048)
    )
    jitted = jax.jit(function, in_shardings=replicated(mesh))
  with contextlib.ExitStack() as patches:
    if arguments.concatenated:
      patches.enter_context(mock.patch.object(norms, "_conv_of", _concatenated))
    record, text = _compile(
      jitted, operands, topology.platform_of(arguments.target)
    )
  _write_text(arguments, text)
  return record


def _concatenated(conv, parts):
  return conv(jnp.concatenate(parts, axis=-1))


def image(arguments: argparse.Namespace, dump: str) -> dict[str, Any]:
  """A backbone's feature maps of one image, whose rows all devices share.

  With `--gradients` also those of the parameters, for cotangents of one.
  """
  del dump
  devices = topology.devices_of(arguments.target)
  mesh = jax.make_mesh(
    (len(devices),), (ROWS_AXIS,), (AxisType.Auto,), devices=devices
  )
  config = get_model_config(
    f"spatial_mamba_{arguments.model}", dtype="bfloat16", drop_path_rate=0.0
  )
  backbone = PureModel(partial(SpatialMambaBackbone, config))

  def features(weights, images):
    maps, _ = backbone.apply(
      weights, lambda network: network(images), train=arguments.gradients
    )
    return maps

  def gradients(weights, images):
    maps, pullback = jax.vjp(lambda x: features(x, images), weights)
    return maps, pullback(jax.tree.map(jnp.ones_like, maps))

  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(None, ROWS_AXIS))
  weights = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    backbone.shapes,
  )
  size = 1, arguments.size, arguments.size, 3
  images = jax.ShapeDtypeStruct(size, "bfloat16", sharding=split)
  function = gradients if arguments.gradients else features
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    record, text = _compile(
      jax.jit(function),
      (weights, images),
      topology.platform_of(arguments.target),
    )
  _write_text(arguments, text)
  return record


def _mesh(target: str, devices: int | None = None, **sizes: int) -> Mesh:
  try:
    described = topology.devices_of(target)
  except topology.TopologyError as error:
    sys.exit(f"--target {target}: {error}")
  return make_mesh(MeshConfig(**sizes), described[:devices])


def _compile(jitted, arguments, platform):
  """Compiles a jitted function; also returns the program's text.

  Its `moved_bytes` are what `hlo` counts: of a kernel, operands and results.
  Its `collectives` are {kind: (number, bytes that a device sends)}.
  For a TPU `estimated_cycles` are libtpu's, of all but kernels and copies.
  `processor_seconds` include tracing and lowering, `compile_seconds` do not.
  """
  processor_start = _processor_seconds()
  lowered = jitted.lower(*arguments)
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  processor_seconds = _processor_seconds() - processor_start
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None
  assert memory is not None
  # XLA itself counts none for a GPU, and a loop's once.
  program = hlo.Program(text)
  launches = program.launches()
  record = {
    "compile_seconds": seconds,
    "processor_seconds": processor_seconds,
    "kernels": text.count(f'"{CUSTOM_CALLS[platform]}"'),
    "all_gathers": text.count(" all-gather"),
    "collectives": collectives.total(collectives.collectives_of(program)),
    "launches": hlo.total_launches(launches),
    "moved_bytes": hlo.total_bytes(launches),
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }
  if platform == "tpu":
    record["estimated_cycles"] = hlo.estimated_cycles(launches)
  return record, text


def _processor_seconds():
  """Returns what this process and its finished children have used."""
  return sum(os.times()[:4])


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _parse(command: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.aot")
  programs = parser.add_subparsers(dest="program", required=True)
  kernel = programs.add_parser("kernel")
  kernel.add_argument("op", choices=[case.name for case in CASES])
  kernel.add_argument("direction", choices=("forward", "backward"))
  kernel.add_argument(
    "--shape",
    type=int,
    nargs=5,
    default=(128, 56, 56, 128, 1),
    metavar=tuple("BHWDN"),
  )
  kernel.add_argument("--dtype", default="bfloat16")
  kernel.add_argument(
    "--cost",
    action="store_true",
    help="for a TPU: count instructions and bytes, which takes as long again",
  )
  inference = programs.add_parser("inference")
  step = programs.add_parser("step")
  image = programs.add_parser("image")
  segmentor = programs.add_parser("segmentor")
  for whole in (inference, step, segmentor, image):
    whole.add_argument(
      "--model", default="tiny", choices=("tiny", "small", "base")
    )
    whole.add_argument("--batch-size", type=int, default=128, help="a device")
    whole.add_argument(
      "--implementation",
      default="",
      choices=("", *IMPLEMENTATIONS),
      help="empty: the best",
    )
    whole.add_argument(
      "--without",
      nargs="+",
      default=(),
      choices=[case.name for case in CASES],
      metavar="OPERATOR",
      help="operators whose kernels are off",
    )
    whole.add_argument("--text", help="a file for the compiled program")
  for whole in (inference, step):
    whole.add_argument(
      "--depths",
      type=int,
      nargs="+",
      default=(),
      help="blocks of each stage, if not the model's",
    )
  step.add_argument(
    "--replica", type=int, default=1, help="slices, or other slow groups"
  )
  step.add_argument(
    "--fsdp", type=int, default=1, help="devices that share the parameters"
  )
  segmentor.add_argument("--train", action="store_true", help="the step")
  segmentor.add_argument(
    "--concatenated", action="store_true", help="concatenate UPerNet's maps"
  )
  image.add_argument("--size", type=int, default=8192, help="height and width")
  image.add_argument(
    "--gradients", action="store_true", help="with the backward pass"
  )
  for subparser in (kernel, inference, step, segmentor, image):
    subparser.add_argument(
      "--target", default="v5e:2x2", help="TPU topology, or a GPU"
    )
    subparser.add_argument(
      "--optimization-level",
      choices=("O0", "O1", "O2", "O3"),
      help="the less, the sooner compiled; unset: JAX_OPTIMIZATION_LEVEL",
    )
  return parser.parse_args(command)


if __name__ == "__main__":
  main()
