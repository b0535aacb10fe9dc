"""Kernels and training steps, compiled for TPUs by the real compiler.

Run by `make aot`, in an environment of its own with libtpu.
"""

import pytest
from spatial_mamba_kernels.cases import CASES

from benchmarks.tpu_static import compiled
from tests.aot.golden import STEP_V5E, assert_golden

pytestmark = pytest.mark.aot

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Those for which each operator is compiled.
RECENT = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
DIRECTIONS = ("forward", "backward")
OPS = [case.name for case in CASES if "mosaic_tpu" in case.operator.kernels]
PARTS = [name for name in OPS if name != "structure_aware_ssm"]
# [B, H, W, D, N] at the first and the last stage of tiny, at stage 1 of base,
# in images of 800 x 1280 pixels, off the sizes of a register and of a row, and
# with states.
SHAPES = (
  (16, 56, 56, 128, 1),
  (16, 7, 7, 1024, 1),
  (16, 56, 56, 192, 1),
  (8, 200, 320, 128, 1),
  (3, 7, 19, 96, 1),
  (1, 1, 1, 1, 1),
  (16, 14, 14, 512, 16),
)
# Those that another code path, or another size of VMEM, could break.
HARD_SHAPES = SHAPES[-4:]
MEMORY = 15.75 * 2**30  # Of a v5e, in bytes.
# Less optimisation changes neither the kernels nor how a program is sharded,
# plans no less memory, and takes a fraction of the time.
FAST = ("--optimization-level", "O0")


def assert_kernel_compiles(*arguments):
  record = compiled("kernel", *arguments, *FAST)
  assert record["kernels"] == 1
  return record


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [(shape, "bfloat16") for shape in SHAPES]
  + [(shape, "float32") for shape in HARD_SHAPES[:-1]],
  ids=str,
)
def test_the_fused_operator_fits_a_v5e_at_every_shape(shape, dtype, direction):
  assert_kernel_compiles(
    "structure_aware_ssm", direction, "--dtype", dtype, "--shape", *shape
  )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", PARTS)
@pytest.mark.parametrize("shape", HARD_SHAPES, ids=str)
def test_its_parts_fit_a_v5e(shape, op, direction):
  assert_kernel_compiles(op, direction, "--dtype", "float32", "--shape", *shape)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
  ("target", "op"),
  [(target, "structure_aware_ssm") for target in TARGETS]
  + [(target, op) for target in RECENT for op in PARTS],
)
def test_every_generation(target, op, direction):
  assert_kernel_compiles(
    op, direction, "--target", target, "--shape", *SHAPES[0]
  )


@pytest.mark.parametrize(
  ("op", "direction", "bundles"),
  [
    # Those of the scan are a goal; the others a little above what was measured.
    ("selective_scan", "forward", 1.5),
    ("selective_ssm", "forward", 1.6),
    ("selective_ssm", "backward", 4.5),
    ("structure_aware_ssm", "forward", 4),
    ("structure_aware_ssm", "backward", 12),
  ],
)
def test_what_a_kernel_costs(op, direction, bundles):
  record = assert_kernel_compiles(op, direction, "--cost")
  assert record["moved_bytes"] <= 1.05 * record["compulsory_bytes"]
  assert record["step_bundles"] <= bundles * record["step_tokens"]


@pytest.mark.parametrize(
  ("model", "target", "batch_size"),
  [
    ("tiny", "v5e:2x2", 64),
    ("base", "v5e:16x16", 8),
  ],
)
def test_sharded_training_step(model, target, batch_size):
  record = compiled(
    "step",
    *("--model", model, "--target", target),
    *("--batch-size", batch_size, *FAST),
  )
  assert record["kernels"] == 8  # Forward and backward, of each stage.
  assert record["all_gathers"] == 0
  used = record["argument_bytes"] + record["temporary_bytes"]
  assert used < MEMORY
  if (model, target) == ("tiny", "v5e:2x2"):
    assert_golden(record, STEP_V5E)
