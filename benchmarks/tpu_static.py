"""What the TPU kernels cost, read off the compiled programs; no TPU is needed.

    python -m benchmarks.tpu_static > table.md

For each kernel at the stages of the tiny model, compiled for a v5e: bundles
(instructions, a cycle each at best) a token and 128 channels, of a step of the
grid with every branch taken; bytes moved between HBM and VMEM over the
compulsory ones, which are the operator's arguments and result, and backward
their cotangents; VMEM used. Then bytes and temporary memory of a training step,
with kernels and with "associative".

Needs `pip install ".[train,aot]"`. Takes some ten minutes on two cores.
"""

import argparse
import multiprocessing
import sys
from multiprocessing.connection import Connection
from typing import Any

import jax
from spatial_mamba_kernels.cases import CASES

from benchmarks import aot

BATCH_SIZE = 128
# Those with a kernel.
OPS = [case.name for case in CASES if "mosaic_tpu" in case.operator.kernels]
STAGES = ((56, 128, 1), (28, 256, 1), (14, 512, 1), (7, 1024, 1))  # H = W, D, N
TARGET = "v5e:2x2"
# Processes that have imported all that compiles, and loaded no compiler.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([aot.__name__])


def main() -> None:
  """Prints two Markdown tables."""
  argparse.ArgumentParser(prog="python -m benchmarks.tpu_static").parse_args()
  sizes = ", ".join(f"{size} x {size}" for size, *_ in STAGES)
  print(
    f"| kernel, bfloat16, batch {BATCH_SIZE}, at {sizes}"
    " | bundles | HBM bytes / compulsory | VMEM, MiB |"
  )
  print("| --- | --- | --- | --- |")
  for op in OPS:
    for direction in ("forward", "backward"):
      print(_kernel_row(op, direction), flush=True)
  print()
  print(
    f"| tiny training step, {BATCH_SIZE} images a chip, {TARGET} |"
    " temporary memory, GiB | bytes moved, GB |"
  )
  print("| --- | --- | --- |")
  for name in ("", "associative"):
    print(_step_row(name), flush=True)


def _joined(values, form):
  return ", ".join(format(value, form) for value in values)


def compiled(*arguments: Any) -> dict[str, Any]:
  """What `benchmarks.aot` says, in a process of its own.

  Raises:
    SystemExit: it failed, or crashed; standard error has its last words.
  """
  command = tuple(map(str, arguments))
  receiver, sender = _PROCESSES.Pipe(duplex=False)
  process = _PROCESSES.Process(target=_send_record, args=(sender, command))
  process.start()
  sender.close()
  try:
    return receiver.recv()
  except EOFError:
    process.join()
    sys.exit(
      f"python -m benchmarks.aot {' '.join(command)}: exit status"
      f" {process.exitcode}"
    )


def _send_record(sender: Connection, command: tuple[str, ...]) -> None:
  jax.config.update("jax_enable_compilation_cache", False)
  sender.send(aot.compile_program(command))


def _kernel_row(op, direction):
  records = [
    compiled(
      *("kernel", op, direction, "--cost", "--target", TARGET),
      *("--shape", BATCH_SIZE, size, size, *rest),
    )
    for size, *rest in STAGES
  ]
  bundles = [x["step_bundles"] / x["step_tokens"] for x in records]
  moved = [x["moved_bytes"] / x["compulsory_bytes"] for x in records]
  vmem = [x["vmem_bytes"] / 2**20 for x in records]
  return (
    f"| {op} {direction} | {_joined(bundles, '.1f')}"
    f" | {_joined(moved, '.2f')} | {_joined(vmem, '.1f')} |"
  )


def _step_row(implementation):
  record = compiled(
    "step",
    *("--target", TARGET, "--batch-size", BATCH_SIZE),
    *("--implementation", implementation, "--optimization-level", "O0"),
  )
  return (
    f"| {implementation or 'kernels'}"
    f" | {record['temporary_bytes'] / 2**30:.1f}"
    f" | {record['moved_bytes'] / 1e9:.1f} |"
  )


if __name__ == "__main__":
  main()
