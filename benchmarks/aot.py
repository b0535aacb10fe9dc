"""Compiles one program for a TPU that is not there, and says what came of it.

    python -m benchmarks.aot forward --target v5e:2x2 --shape 128 56 56 128 1
    python -m benchmarks.aot step --target v5e:16x16 --batch-size 64

It prints one line of JSON. libtpu is needed (`pip install ".[train,aot]"`). A
compiler that aborts takes its process along: compile one program in each.
"""

import argparse
import glob
import json
import os
import re
import runpy
import tempfile
import time
from functools import partial
from typing import Any

# A host of one v5e that is not there either; before libtpu is loaded.
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_ACCELERATOR_TYPE="v5litepod-4",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)
from spatial_mamba_kernels.structure_aware_ssm import (
  mosaic_tpu,
)


def main() -> None:
  """Compiles as the command line says."""
  arguments = _parse()
  if arguments.program == "step":
    print(json.dumps(step(arguments)))
    return
  with tempfile.TemporaryDirectory() as dump:
    # Read when libtpu is loaded, which is with the first topology.
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    )
    record = kernel(arguments)
    record["loop_bundles"] = loop_bundles(dump)
  print(json.dumps(record))


def kernel(arguments: argparse.Namespace) -> dict[str, Any]:
  """The fused operator's forward or backward kernel on one chip."""
  batch, height, width, channels, states = arguments.shape
  sharding = NamedSharding(_mesh(arguments.target, 1), PartitionSpec())

  def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  image = array(batch, height, width, channels, dtype=arguments.dtype)
  tokens = array(batch, height, width, states, dtype=arguments.dtype)
  channel = array(channels)
  arrays = (
    image,
    image,
    array(channels, states),
    tokens,
    tokens,
    channel,
    array(3, 3, 3, channels),
    array(3),
    channel,
  )
  forward = partial(mosaic_tpu.run_forward, save=True)
  if arguments.program == "forward":
    return _compile(forward, (arrays,))
  _, saved = jax.eval_shape(forward, arrays)
  saved = array(*saved.shape)
  return _compile(mosaic_tpu.run_backward, (arrays, saved, image))


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
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return _compile(
      function, (state, batch), donate_argnums=0, out_shardings=whole
    )


def _mesh(target: str, devices: int | None = None) -> Mesh:
  topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
  chips = np.array(topology.devices[:devices])
  return Mesh(chips, ("data",), axis_types=(AxisType.Auto,))


def _compile(function, arguments, **options) -> dict[str, Any]:
  start = time.perf_counter()
  compiled = jax.jit(function, **options).lower(*arguments).compile()
  seconds = time.perf_counter() - start
  text, memory = compiled.as_text(), compiled.memory_analysis()
  cost = compiled.cost_analysis()
  assert text is not None
  assert memory is not None
  assert cost is not None
  return {
    "compile_seconds": seconds,
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "all_gathers": text.count(" all-gather"),
    "accessed_bytes": cost["bytes accessed"],
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
  }


def loop_bundles(dump: str) -> list[tuple[int, int]]:
  """(depth, bundles) of each loop in a kernel's scheduled program."""
  (path,) = (
    name
    for name in glob.glob(f"{dump}/*structure_aware_ssm*-final_bundles.txt")
    if "schedule-analysis" not in name
  )
  loops: list[list[int]] = []  # Depth, first bundle, the first one after.
  with open(path) as file:
    for line in file:
      bundle = re.match(r"\s*0x([0-9a-f]+)\s+(LB)?[^{]*?(>*)\s*[:{]", line)
      if bundle is None:
        continue
      address, depth = int(bundle[1], 16), line.split("{")[0].count(">")
      for loop in loops:
        if len(loop) == 2 and depth < loop[0]:
          loop.append(address)
      if bundle[2]:
        loops.append([depth, address])
  return [(loop[0], loop[2] - loop[1]) for loop in loops if len(loop) == 3]


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.aot")
  parser.add_argument("program", choices=("forward", "backward", "step"))
  parser.add_argument("--target", default="v5e:2x2", help="TPU topology")
  parser.add_argument(
    "--shape",
    type=int,
    nargs=5,
    default=(128, 56, 56, 128, 1),
    metavar=tuple("BHWDN"),
  )
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument(
    "--model", default="tiny", choices=("tiny", "small", "base")
  )
  parser.add_argument("--batch-size", type=int, default=128, help="a chip")
  parser.add_argument("--implementation", default="", help="empty: the best")
  return parser.parse_args()


if __name__ == "__main__":
  main()
