"""What the TPU kernels cost, read off the compiled programs; no TPU is needed.

    python -m benchmarks.tpu_static > table.md

For each kernel at each stage of the tiny model, compiled for a v5e: bundles
(instructions, a cycle each at best) a token and 128 channels, with every branch
of a step of the grid taken, and of its loops over tiles alone; bytes moved
between HBM and VMEM over the compulsory ones, which are the operator's
arguments and result, and backward their cotangents; VMEM used. Then bytes and
temporary memory of a training step, with kernels and with "associative".

Needs `pip install ".[train,aot]"`. Takes some ten minutes on two cores.
"""

import json
import os
import subprocess
import sys
from typing import Any

BATCH_SIZE = 128
OPS = ("structure_aware_ssm", "selective_scan", "state_fusion")
STAGES = ((56, 128), (28, 256), (14, 512), (7, 1024))  # H = W, D.
STEP_TARGET = "v5p:2x2x1"  # A v5e has no memory for "associative".


def main() -> None:
  """Prints two Markdown tables."""
  print(
    "| kernel, bfloat16, batch 128 | tokens, channels | bundles, whole step"
    " | bundles, loops | HBM bytes / compulsory | VMEM, MiB |"
  )
  print("| --- | --- | --- | --- | --- | --- |")
  for op in OPS:
    for direction in ("forward", "backward"):
      for size, channels in STAGES:
        print(_kernel_row(op, direction, size, channels), flush=True)
  print()
  print(
    f"| tiny training step, {BATCH_SIZE} images a chip, {STEP_TARGET} |"
    " temporary memory, GiB | bytes accessed, GB |"
  )
  print("| --- | --- | --- |")
  for name in ("", "associative"):
    print(_step_row(name), flush=True)


def compiled(*arguments: Any) -> dict[str, Any]:
  """What `benchmarks.aot` says, in a process of its own.

  Raises:
    RuntimeError: it failed, or crashed; with its last words.
  """
  process = subprocess.run(
    (sys.executable, "-m", "benchmarks.aot", *map(str, arguments)),
    capture_output=True,
    text=True,
    timeout=900,
    env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
  )
  if process.returncode:
    raise RuntimeError(process.stderr[-2000:])
  return json.loads(process.stdout.splitlines()[-1])


def _kernel_row(op, direction, size, channels):
  shape = (BATCH_SIZE, size, size, channels, 1)
  record = compiled("kernel", op, direction, "--shape", *shape)
  tokens = record["step_tokens"]
  in_loops = sum(trips * bundles for trips, bundles in record["loops"])
  moved = record["moved_bytes"] / record["compulsory_bytes"]
  return (
    f"| {op} {direction} | {size} x {size}, {channels}"
    f" | {record['step_bundles'] / tokens:.2f} | {in_loops / tokens:.2f}"
    f" | {moved:.3f} | {record['vmem_bytes'] / 2**20:.1f} |"
  )


def _step_row(implementation):
  record = compiled(
    "step",
    *("--target", STEP_TARGET, "--batch-size", BATCH_SIZE),
    *("--implementation", implementation, "--effort", -1),
  )
  return (
    f"| {implementation or 'kernels'}"
    f" | {record['temporary_bytes'] / 2**30:.1f}"
    f" | {record['accessed_bytes'] / 1e9:.1f} |"
  )


if __name__ == "__main__":
  main()
