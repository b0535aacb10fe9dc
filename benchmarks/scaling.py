"""Weak scaling of the training step, read off programs; no TPU is needed.

    python -m benchmarks.scaling > table.md

Compiles the tiny model's step for 4 to 1,024 chips of a v5e, with as many
images a chip, and prints what a chip sends and holds: with data parallelism
alone, and with parameters sharded over `fsdp`. Needs
`pip install ".[train,aot]"`. Each row is a compilation.
"""

import argparse

from benchmarks.tpu_static import compiled

BATCH_SIZE = 8  # Images a chip.
# A pod has 256 chips; more are slices, joined by the data centre's network.
TARGETS = {
  4: "v5e:2x2",
  16: "v5e:4x4",
  64: "v5e:8x8",
  256: "v5e:16x16",
  1024: "4xv5e:16x16",
}
MOST_SHARDS = 8


def main() -> None:
  """Prints a Markdown table."""
  argparse.ArgumentParser(prog="python -m benchmarks.scaling").parse_args()
  print(
    "| chips | topology | replica, data, fsdp | collectives a step"
    " | MB sent by a chip | MB of state and batch a chip | MB of temporaries |"
  )
  print("| --- | --- | --- | --- | --- | --- | --- |")
  for is_sharded in (False, True):
    for chips, target in TARGETS.items():
      shards = min(chips, MOST_SHARDS) if is_sharded else 1
      print(_row(chips, target, shards), flush=True)


def _row(chips: int, target: str, shards: int) -> str:
  replica = int(target.partition("x")[0]) if target[0].isdecimal() else 1
  record = compiled(
    "step",
    *("--target", target, "--batch-size", BATCH_SIZE),
    *("--replica", replica, "--fsdp", shards, "--optimization-level", "O0"),
  )
  counts, sent = zip(*record["collectives"].values(), strict=True)
  return (
    f"| {chips:,} | {target} | {replica}, {chips // replica // shards},"
    f" {shards} | {sum(counts)} | {sum(sent) / 1e6:.0f}"
    f" | {record['argument_bytes'] / 1e6:.0f}"
    f" | {record['temporary_bytes'] / 1e6:.0f} |"
  )


if __name__ == "__main__":
  main()
