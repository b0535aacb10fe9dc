"""Kernels and training steps, compiled for GPUs by the real compilers.

Run by `make aot`, in an environment of its own with JAX's CUDA plugin and a
ptxas. Shared memory beyond a device's is refused by the compiler.
"""

import pytest

from benchmarks.tpu_static import compiled

pytestmark = pytest.mark.aot

TARGETS = ("H100", "H200", "B200")
DIRECTIONS = ("forward", "backward")
OPS = ("selective_scan", "state_fusion", "structure_aware_ssm")
MOST_SMEM = 232_448  # What a program may have, in bytes.
# Kernels of the operators, forward and backward.
COUNTS = {
  ("selective_scan", "forward"): 1,
  ("selective_scan", "backward"): 1,
  ("state_fusion", "forward"): 1,
  ("state_fusion", "backward"): 2,
  ("structure_aware_ssm", "forward"): 1,
  ("structure_aware_ssm", "backward"): 4,
}
# [B, H, W, D, N] at the four stages of tiny, at stage 1 of base, in images of
# 512 x 512 and 800 x 1280 pixels, and of a pixel.
SHAPES = (
  (128, 56, 56, 128, 1),
  (128, 28, 28, 256, 1),
  (128, 14, 14, 512, 1),
  (128, 7, 7, 1024, 1),
  (128, 56, 56, 192, 1),
  (16, 128, 128, 128, 1),
  (16, 200, 320, 128, 1),
  (128, 3, 61, 96, 1),
)
# Of these in float32: those that fit, and are cut, otherwise.
WIDE = (SHAPES[0], SHAPES[3], *SHAPES[-2:])
# So few programs that tokens and rows are cut: a kernel more for each scan.
SINGLE = ((1, 56, 56, 128, 1), (1, 14, 14, 512, 1))


def assert_kernels_compile(*arguments):
  record = compiled("kernel", *arguments)
  assert record["kernels"] == len(record["programs"])
  for program in record["programs"]:
    assert program["spilled_bytes"] == 0, program
    assert program["smem_bytes"] <= MOST_SMEM, program
  return record


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [(shape, "bfloat16") for shape in SHAPES]
  + [(shape, "float32") for shape in (*WIDE, (1, 1, 1, 1, 1))],
  ids=str,
)
def test_the_fused_operator_at_every_shape(shape, dtype, direction):
  assert_kernels_compile(
    *("structure_aware_ssm", direction, "--target", "H200"),
    *("--dtype", dtype, "--shape", *shape),
  )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_generation(target, op, direction):
  record = assert_kernels_compile(op, direction, "--target", target)
  assert record["kernels"] == COUNTS[op, direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SINGLE, ids=str)
def test_one_image(shape, direction):
  record = assert_kernels_compile(
    *("structure_aware_ssm", direction, "--target", "H200"),
    *("--shape", *shape),
  )
  assert record["kernels"] > COUNTS["structure_aware_ssm", direction]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("states", [3, 16])
def test_several_states(states, direction):
  assert_kernels_compile(
    *("selective_scan", direction, "--target", "H200"),
    *("--shape", 128, 14, 14, 512, states),
  )


@pytest.mark.parametrize("target", TARGETS)
def test_sharded_training_step(target):
  record = compiled(
    "step", "--target", f"{target}:4", "--batch-size", 128, "--model", "tiny"
  )
  # One kernel forward and four backward, of each stage.
  assert record["kernels"] == 20
  assert record["all_gathers"] == 0
