"""What compiled programs have, so that no refactor changes one unseen."""

import pytest

# Of any of these figures, the share that may change: what a compiler's version
# or a reordered sum may do, and less than an array more in a program.
TOLERANCE = 0.01
# The training step of tiny at batch 128 a device, on four.
STEP_H200 = {
  "kernels": 251,
  "all_gathers": 0,
  "moved_bytes": 62_474_741_313,
  "argument_bytes": 447_270_948,
  "temporary_bytes": 8_617_438_992,
}
# The same at batch 64 a chip, with the compiler's least effort.
STEP_V5E = {
  "kernels": 8,
  "all_gathers": 0,
  "moved_bytes": 48_861_918_984,
  "argument_bytes": 439_631_872,
  "temporary_bytes": 4_592_959_488,
  "estimated_cycles": 580_118_578,
}


def assert_golden(record, figures):
  """Compares what `benchmarks.aot` said with what it said before."""
  found = {name: record[name] for name in figures}
  assert found == {
    name: pytest.approx(value, rel=TOLERANCE) for name, value in figures.items()
  }
