"""Compiles one program for a TPU that is not there, and says what came of it.

    python -m benchmarks.aot kernel structure_aware_ssm backward \
      --target v5e:2x2 --shape 128 56 56 128 1
    python -m benchmarks.aot step --model tiny --target v5e:16x16

It prints one line of JSON. libtpu is needed (`pip install ".[train,aot]"`). A
compiler that aborts takes its process along: compile one program in each.
"""

import argparse
import glob
import json
import math
import os
import re
import runpy
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)
from spatial_mamba_kernels.by_platform import Kernel
from spatial_mamba_kernels.selective_scan import mosaic_tpu as selective_scan
from spatial_mamba_kernels.state_fusion import mosaic_tpu as state_fusion
from spatial_mamba_kernels.state_fusion.xla import DILATIONS
from spatial_mamba_kernels.structure_aware_ssm import (
  mosaic_tpu as structure_aware_ssm,
)

# A host of one v5e that is not there either. Nothing is computed, so processes
# may share it.
ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

KERNELS: dict[str, Kernel] = {
  "selective_scan": selective_scan.KERNEL,
  "state_fusion": state_fusion.kernel(DILATIONS),
  "structure_aware_ssm": structure_aware_ssm.KERNEL,
}


def main() -> None:
  """Compiles as the command line says."""
  arguments = _parse()
  # Before libtpu is loaded, which is with the first topology.
  os.environ.update(ENVIRONMENT)
  jax.config.update("jax_platforms", "cpu")
  if arguments.program == "step":
    print(json.dumps(step(arguments)))
    return
  with tempfile.TemporaryDirectory() as dump:
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    )
    record = kernel(arguments)
    record.update(bundles(dump, arguments.op))
  print(json.dumps(record))


def kernel(arguments: argparse.Namespace) -> dict[str, Any]:
  """An operator's forward or backward kernel on one chip.

  Returns:
    What `_compile` does; and, of the kernel alone, `moved_bytes` between HBM
    and VMEM; `compulsory_bytes`, of the operator's arguments and result, and
    backward of their cotangents; `vmem_bytes`; and `step_tokens`, of 128
    channels each, that a step of the grid computes.
  """
  sharding = NamedSharding(_mesh(arguments.target, 1), PartitionSpec())

  def placed(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  function, operands = program(
    arguments.op, arguments.direction, arguments.shape, arguments.dtype
  )
  operands = jax.tree.map(placed, operands)
  record, text = _compile(function, operands)
  (call,) = re.findall(r'custom_call_target="tpu_custom_call".*', text)
  vmem = re.search(r'used_scoped_memory_configs.*?"size":"(\d+)"', call)
  assert vmem is not None
  arrays = operands[0]
  cut = KERNELS[arguments.op].plan(arrays)
  _, height, width, *_ = arguments.shape
  if arguments.op == "selective_scan":
    width = selective_scan.row_length(height * width)
  forward = partial(KERNELS[arguments.op].passes.forward, save=False)
  compulsory = _bytes((arrays, jax.eval_shape(forward, arrays)))
  if arguments.direction == "backward":
    compulsory += _bytes(arrays)
  return {
    **record,
    "moved_bytes": moved_bytes(function, operands),
    "compulsory_bytes": compulsory,
    "vmem_bytes": int(vmem[1]),
    "step_tokens": cut.group * width * -(-cut.block // 128),
  }


def program(
  op: str, direction: str, shape: tuple[int, ...], dtype: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """An operator's forward pass, saving, or backward pass, and its arguments.

  Args:
    op: a name in `KERNELS`.
    direction: "forward" or "backward".
    shape: B, H, W, D, N.
    dtype: of what has a number or more a pixel, but for states, in float32.
  """
  passes = KERNELS[op].passes
  arrays = _arrays(op, *shape, dtype=dtype)
  forward = partial(passes.forward, save=True)
  if direction == "forward":
    return forward, (arrays,)
  result, *saved = jax.eval_shape(forward, arrays)
  if op == "selective_scan":
    saved = [result]
  return passes.backward, (arrays, tuple(saved), result)


def _arrays(op, batch, height, width, channels, states, *, dtype):
  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

  pixels = partial(array, batch, height, width, dtype=dtype)
  channel, A = array(channels), array(channels, states)
  stencil = (array(3, 3, 3, channels), array(3))
  image, numbers = pixels(channels), pixels(states)
  if op == "state_fusion":
    return (image, *stencil)
  if op == "selective_scan":
    tokens = partial(array, batch, height * width, dtype=dtype)
    return tokens(channels), tokens(channels), A, tokens(states), channel
  return image, image, A, numbers, numbers, channel, *stencil, channel


def step(arguments: argparse.Namespace) -> dict[str, Any]:
  """A training step of one of the ImageNet experiments, without MESA."""
  # Here, because kernels are compiled without what training needs.
  from spatial_mamba_jax.training import optimizer as optimizers
  from spatial_mamba_jax.training import state as states
  from spatial_mamba_jax.training import step as steps

  mesh = _mesh(arguments.target)
  config = runpy.run_path(f"configs/imagenet_{arguments.model}.py")[
    "get_config"
  ]()
  config.mesa_weight = 0.0
  config.batch_size = arguments.batch_size * mesh.size
  config.model.implementation = arguments.implementation
  epoch_steps = 1_281_167 // config.batch_size
  schedule = optimizers.make_schedule(
    config.optimizer,
    batch_size=config.batch_size,
    epochs=config.epochs,
    epoch_steps=epoch_steps,
  )
  optimizer = optimizers.make_optimizer(config.optimizer, schedule)
  model = states.PureModel(config.model.build())
  function = steps.make_train_step(
    model,
    optimizer,
    steps.make_preprocess(config),
    config,
    epoch_steps=epoch_steps,
  )
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec("data"))
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    states.state_shapes(model, optimizer),
  )
  shape = (config.batch_size, 224, 224, 3)
  batch = {
    "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=split),
    "label": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=split),
  }
  effort = {"exec_time_optimization_effort": arguments.effort}
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    record, _ = _compile(
      function,
      (state, batch),
      effort,
      donate_argnums=0,
      out_shardings=whole,
    )
  return record


def _mesh(target: str, devices: int | None = None) -> Mesh:
  topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
  chips = np.array(topology.devices[:devices]).flatten()
  return Mesh(chips, ("data",), axis_types=(AxisType.Auto,))


def _compile(function, arguments, options=None, **jit_options):
  """Compiles; also returns the program's text."""
  lowered = jax.jit(function, **jit_options).lower(*arguments)
  start = time.perf_counter()
  compiled = lowered.compile(compiler_options=options)
  seconds = time.perf_counter() - start
  text, memory = compiled.as_text(), compiled.memory_analysis()
  cost = compiled.cost_analysis()
  assert text is not None
  assert memory is not None
  assert cost is not None
  record = {
    "compile_seconds": seconds,
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "all_gathers": text.count(" all-gather"),
    "accessed_bytes": cost["bytes accessed"],
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }
  return record, text


def _bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def moved_bytes(function: Any, arguments: Any) -> int:
  """What the one kernel in a function moves between HBM and VMEM.

  A block is moved when a step of the grid wants another one than the step
  before; channels in whole registers.
  """
  (call,) = _kernel_calls(jax.make_jaxpr(function)(*arguments).jaxpr)
  mapping = call.params["grid_mapping"]
  # The first axes repeat what the last one does.
  *repeats, last = mapping.grid
  steps = np.arange(last, dtype=np.int32)
  total = 0
  for block in mapping.block_mappings:
    index_map = jaxpr_as_fun(block.index_map_jaxpr)
    indices = np.stack([index_map(0, 0, step) for step in steps])
    moves = 1 + int(np.sum(np.any(np.diff(indices, axis=0), axis=1)))
    array = block.array_aval
    total += moves * math.prod(repeats) * _block_bytes(block, array.dtype)
  return total


def _block_bytes(block, dtype) -> int:
  sizes = [getattr(size, "block_size", size) for size in block.block_shape]
  sizes = [size for size in sizes if isinstance(size, int)]
  *rows, lanes = sizes
  return math.prod(rows) * -(-lanes // 128) * 128 * dtype.itemsize


def _kernel_calls(jaxpr) -> Iterator[Any]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for value in equation.params.values():
        if isinstance(value, ClosedJaxpr):
          yield from _kernel_calls(value.jaxpr)


def bundles(dump: str, op: str) -> dict[str, Any]:
  """What `count_bundles` does, of the kernel whose compilation left `dump`."""
  (path,) = (
    name
    for name in glob.glob(f"{dump}/*{op}*-final_bundles.txt")
    if "schedule-analysis" not in name
  )
  with open(path) as file:
    return count_bundles(file.read())


# A bundle with nothing in it does not say how deep it lies.
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s+(\w\w)?\s*:?\s*(>*)\s*\{(\}?)")
_EXIT_TEST = re.compile(
  r"scmp\.ge\.\S+ (?:\(\S+\), )?%\w+, (\d+)\s+/\* loop exit test"
)


def count_bundles(text: str) -> dict[str, Any]:
  """Instructions, each a cycle at best, of a scheduled TPU kernel.

  Args:
    text: the file `*-final_bundles.txt` of libtpu's dump.

  Returns:
    `loops`: [trips, bundles of a trip without those of inner loops], innermost
    first; and `step_bundles`: of a step of the grid, every branch taken.

  Raises:
    ValueError: a loop has no end that can be read.
  """
  loops = []
  grid = {"own": 0, "all": 0}  # The outermost loop, and the last to end.
  stack = [{"trips": 0, "own": 0, "all": 0}]  # Depth is the place in it.

  def close(depth):
    while len(stack) > depth:
      loop = stack.pop()
      if not loop["trips"]:
        raise ValueError("cannot tell how often a loop of this kernel runs")
      if len(stack) == 1:
        grid.update(loop)
        return
      stack[-1]["all"] += loop["trips"] * (loop["own"] + loop["all"])
      loops.append((loop["trips"], loop["own"]))

  for line in text.splitlines():
    if bundle := _BUNDLE.match(line):
      label, depth = bundle[1], len(bundle[2])
      if bundle[3]:
        depth = len(stack) - 1
      close(depth if label == "LB" else depth + 1)
      if label == "LB":
        stack.append({"trips": 0, "own": 0, "all": 0})
      stack[-1]["own"] += 1
    # That of the loop around may stand among an inner loop's last bundles.
    for test in _EXIT_TEST.finditer(line):
      loops_left = [loop for loop in stack if not loop["trips"]]
      loops_left[-1]["trips"] = int(test[1])
  close(1)
  return {"loops": loops, "step_bundles": grid["own"] + grid["all"]}


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.aot")
  programs = parser.add_subparsers(dest="program", required=True)
  kernel = programs.add_parser("kernel")
  kernel.add_argument("op", choices=KERNELS)
  kernel.add_argument("direction", choices=("forward", "backward"))
  kernel.add_argument(
    "--shape",
    type=int,
    nargs=5,
    default=(128, 56, 56, 128, 1),
    metavar=tuple("BHWDN"),
  )
  kernel.add_argument("--dtype", default="bfloat16")
  step = programs.add_parser("step")
  step.add_argument(
    "--model", default="tiny", choices=("tiny", "small", "base")
  )
  step.add_argument("--batch-size", type=int, default=128, help="a chip")
  step.add_argument("--implementation", default="", help="empty: the best")
  step.add_argument(
    "--effort", type=float, default=0.0, help="-1: compile fast, not well"
  )
  for subparser in (kernel, step):
    subparser.add_argument("--target", default="v5e:2x2", help="TPU topology")
  return parser.parse_args()


if __name__ == "__main__":
  main()
