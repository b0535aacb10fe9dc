"""What compiled programs have, so that no refactor changes one unseen."""

import pytest

# Of any of these figures, the share that may change: what a compiler's version
# or a reordered sum may do, and less than an array more in a program.
TOLERANCE = 0.01
# Inference of tiny with one block a stage, at batch 128.
INFERENCE_H200 = {"moved_bytes": 7_594_297_216, "launches": 142}
# The training step of it at batch 128 a device, on eight that share parameters.
STEP_H200 = {
  "kernels": 58,
  "moved_bytes": 28_266_910_498,
  "argument_bytes": 35_689_348,
  "temporary_bytes": 4_461_319_568,
}
# All of tiny at batch 64 a chip, on four, with the compiler's least effort.
STEP_V5E = {
  "kernels": 8,
  "all_gathers": 0,
  "moved_bytes": 48_861_918_984,
  "argument_bytes": 439_631_872,
  "temporary_bytes": 4_592_959_488,
  "estimated_cycles": 580_118_578,
}
# Collectives of the step of tiny, {kind: (runs, bytes that a device sends)}, by
# machine and `fsdp`: at 8 images a chip with the least effort, at 128 a GPU
# with one block a stage.
COLLECTIVES = {
  ("v5e:16x16", 1): {
    "all-reduce": (54, 110_596_767),
    "collective-permute": (2, 4_848_896),
  },
  ("v5e:16x16", 8): {
    "all-gather": (290, 176_302_336),
    "all-reduce": (105, 37_992_438),
    "reduce-scatter": (19, 36_356_096),
    "collective-permute": (2, 4_848_896),
  },
  ("H200:8", 8): {
    "all-gather": (2, 27_138_944),
    "all-reduce": (18, 332_668),
    "reduce-scatter": (2, 15_865_472),
    "all-to-all": (12, 609_280),
    "collective-permute": (2, 77_582_336),
  },
}
# Bytes of `selective_ssm` on an H200 by states and direction, of 128 images of
# 14 x 14 pixels and 512 channels in bfloat16.
SELECTIVE_SSM_BYTES = {
  (1, "forward"): 80_986_112,
  (1, "backward"): 135_610_368,
  (16, "forward"): 139_726_848,
  (16, "backward"): 235_147_264,
}


def assert_golden(record, figures):
  """Compares what `benchmarks.aot` said with what it said before."""
  found = {name: record[name] for name in figures}
  assert found == {
    name: pytest.approx(value, rel=TOLERANCE) for name, value in figures.items()
  }
