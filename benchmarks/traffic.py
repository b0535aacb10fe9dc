"""Counts the bytes that a network moves; no device is needed.

    python -m benchmarks.traffic --target H200
    python -m benchmarks.traffic --target H200 --kernels

Compiles inference and the training step for a GPU or TPU, and prints bytes an
image in device memory and launches by kind of layer, as `hlo` counts them. The
last row is the ideal, with everything fused that can be
(`network.forward_bytes`, `network.training_bytes`). A fusion counts for the
layer of its result. With `--kernels` it compiles the training step alone: with
all kernels, and without those of each family.

It needs `pip install ".[train,aot]"`, and some minutes on two cores for each
program.
"""

import argparse
import collections
import os
import tempfile

from benchmarks import kinds as layers
from benchmarks import network
from benchmarks.tpu_static import compiled
from spatial_mamba_jax.forecast import hlo
from spatial_mamba_jax.models.presets import get_model_config

# {program: (config, image size) -> ideal bytes an image}.
PROGRAMS = {
  "inference": network.forward_bytes,
  "step": network.training_bytes,
}
# Operators whose kernels are switched off together.
FAMILIES = (
  ("mlp",),
  ("residual_layer_norm", "gated_layer_norm"),
  (
    "depthwise_conv",
    "residual_depthwise_conv",
    "silu_depthwise_conv",
    "projected_depthwise_conv",
  ),
  ("relu_depthwise_conv",),
)


def main() -> None:
  """Prints Markdown tables."""
  arguments = _parse()
  if arguments.kernels:
    _print_kernels(arguments)
  else:
    _print_layers(arguments)


def _print_layers(arguments):
  """Prints a table of layers for each program."""
  config = get_model_config(f"spatial_mamba_{arguments.model}")
  for program, ideal_bytes in PROGRAMS.items():
    kinds = count(
      program, arguments.target, arguments.model, arguments.batch_size
    )
    print(
      f"| {arguments.model} {program}, bfloat16, batch {arguments.batch_size},"
      f" {arguments.target} | MB an image | launches |"
    )
    print("| --- | --- | --- |")
    for kind, (size, launches) in kinds.items():
      megabytes = size / arguments.batch_size / 1e6
      print(f"| {kind} | {megabytes:.1f} | {launches} |", flush=True)
    ideal = ideal_bytes(config, 224) / 1e6
    print(f"| with all fused that can be | {ideal:.1f} | |")
    print()


def _print_kernels(arguments):
  """Prints what the training step is without the kernels of each family."""
  print(
    f"| {arguments.model} step, bfloat16, batch {arguments.batch_size},"
    f" {arguments.target}, without the kernels of | MB an image | launches"
    " | compile, s of processor time |"
  )
  print("| --- | --- | --- | --- |")
  for family in ((), *FAMILIES):
    record = compiled(
      *("step", "--target", arguments.target, "--model", arguments.model),
      *("--batch-size", arguments.batch_size),
      *(("--without", *family) if family else ()),
    )
    names = ", ".join(f"`{name}`" for name in family) or "none"
    megabytes = record["moved_bytes"] / arguments.batch_size / 1e6
    print(
      f"| {names} | {megabytes:.1f} | {record['launches']:,}"
      f" | {record['processor_seconds']:.0f} |",
      flush=True,
    )


def count(
  program: str, target: str, model: str, batch_size: int
) -> dict[str, tuple[int, int]]:
  """Compiles a program and returns {kind of layer: (bytes, launches)}."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "program.txt")
    compiled(
      program,
      *("--target", target, "--model", model, "--batch-size", batch_size),
      *("--text", path),
    )
    with open(path) as file:
      return by_kind(hlo.Program(file.read()))


def by_kind(program: hlo.Program) -> dict[str, tuple[int, int]]:
  """Returns {kind of layer: (bytes, launches)}, the sum first, as "all"."""
  kinds = collections.defaultdict(list)
  launches = program.launches()
  for launch in launches:
    kinds[layers.kind(program, launch.instruction)].append(launch)
  counted = {
    kind: (hlo.total_bytes(some), hlo.total_launches(some))
    for kind, some in {"all": launches, **kinds}.items()
  }
  return dict(sorted(counted.items(), key=lambda x: -x[1][0]))


def _parse():
  parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic")
  parser.add_argument("--target", default="H200", help="a GPU, or a topology")
  parser.add_argument(
    "--model", default="tiny", choices=("tiny", "small", "base")
  )
  parser.add_argument("--batch-size", type=int, default=128, help="a device")
  parser.add_argument(
    "--kernels", action="store_true", help="switch kernels off, by family"
  )
  return parser.parse_args()


if __name__ == "__main__":
  main()
