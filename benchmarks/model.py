"""Measures speed and memory of a model: `python -m benchmarks.model`.

Prints the compile time, images a second of inference and of the training step,
the share of the matrix-multiplication rate measured in the same process,
and the peak memory of the compiled programs. `timing` has the protocol.
"""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
from spatial_mamba_kernels import IMPLEMENTATIONS

import spatial_mamba_jax as smj
from benchmarks import network, timing


def main() -> None:
  """Measures as the command line says."""
  arguments = _parse()
  device = jax.devices()[0]
  size = 2048 if device.platform == "cpu" else 8192
  rate = timing.matmul_rate(jnp.dtype(arguments.dtype), size)
  config = network.experiment(
    arguments.model,
    batch_size=arguments.batch_size,
    dtype=arguments.dtype,
    implementation=arguments.implementation,
  )
  results = {}
  for name in arguments.programs:
    program = network.compile_program(name, config, arguments.size)
    results[name] = {
      "compile_seconds": program.compile_seconds,
      **dataclasses.asdict(network.measure(program, rate)),
    }
  if arguments.json:
    record = {
      **vars(arguments),
      "device": device.device_kind,
      "jax": jax.__version__,
      "matmul_flops": rate,
      **results,
    }
    print(json.dumps(record))
    return
  print(
    f"{arguments.model}, batch {arguments.batch_size} at {arguments.size},"
    f" {arguments.dtype}, implementation {arguments.implementation or 'None'},"
    f" {device.device_kind}, jax {jax.__version__}"
  )
  print(f"matmul rate  {rate / 1e9:10.1f} GFLOP/s")
  for name, measured in results.items():
    print(
      f"{name:12s} {measured['images_per_second']:10.2f} images/s"
      f"  {measured['matmul_share']:6.3f} of the matmul rate"
      f"  {measured['peak_bytes'] / 2**20:9.1f} MiB"
      f"  compiled in {measured['compile_seconds']:.1f} s"
    )


def _parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.model")
  parser.add_argument(
    "--model", default="spatial_mamba_tiny", choices=smj.list_models()
  )
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--size", type=int, default=224, help="pixels a side")
  parser.add_argument(
    "--dtype", default="float32", choices=("float32", "bfloat16")
  )
  parser.add_argument(
    "--implementation",
    default="",
    choices=("", *IMPLEMENTATIONS),
    help="default: the platform's best",
  )
  parser.add_argument(
    "--programs",
    nargs="+",
    default=network.PROGRAMS,
    choices=network.PROGRAMS,
  )
  parser.add_argument("--json", action="store_true", help="one line of JSON")
  return parser.parse_args()


if __name__ == "__main__":
  main()
