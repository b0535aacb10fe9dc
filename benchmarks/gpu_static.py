"""What the GPU kernels take, read off the compiled programs; no GPU is needed.

    python -m benchmarks.gpu_static H200 > table.md

For each kernel of the three SSM operators at the stages of the tiny model,
compiled for one of `gpu_targets`: registers of a thread, shared memory of a
program, and instructions (in PTX, of 128 channels' 4 warps each) a token, of
its longest loop with each branch taken and each loop in it run once.

Needs `pip install ".[train,aot]"`. Takes a minute or two on two cores.
"""

import argparse

from benchmarks.tpu_static import BATCH_SIZE, OPS, STAGES, compiled
from spatial_mamba_jax.forecast.gpu_targets import TARGETS


def main() -> None:
  """Prints a Markdown table."""
  parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static")
  parser.add_argument("target", choices=TARGETS)
  target = parser.parse_args().target
  sizes = ", ".join(f"{size} x {size}" for size, *_ in STAGES)
  print(
    f"| kernel, bfloat16, batch {BATCH_SIZE}, at {sizes}"
    " | registers | shared memory, KiB | instructions a token |"
  )
  print("| --- | --- | --- | --- |")
  for op in OPS:
    for direction in ("forward", "backward"):
      for row in _rows(target, op, direction):
        print(row, flush=True)


def _rows(target, op, direction):
  records = [
    compiled(
      *("kernel", op, direction, "--target", target),
      *("--shape", BATCH_SIZE, size, size, *rest),
    )["programs"]
    for size, *rest in STAGES
  ]
  for stages in zip(*records, strict=True):
    registers = ", ".join(str(x["registers"]) for x in stages)
    memory = ", ".join(f"{x['smem_bytes'] / 1024:.0f}" for x in stages)
    work = ", ".join(
      f"{x['loop_instructions'] / x['loop_tokens']:.0f}" for x in stages
    )
    name = f"{op} {direction}: {stages[0]['name']}"
    yield f"| {name} | {registers} | {memory} | {work} |"


if __name__ == "__main__":
  main()
