"""Kernels and training steps, compiled for GPUs by the real compilers.

Run by `make aot`, in an environment of its own with JAX's CUDA plugin and a
ptxas. Shared memory beyond a device's is refused by the compiler.
"""

import jax
import pytest
from spatial_mamba_kernels.cases import CASES, by_name

from benchmarks.tpu_static import compiled
from tests.aot.golden import (
  INFERENCE_H200,
  SELECTIVE_SSM_BYTES,
  assert_golden,
)

pytestmark = pytest.mark.aot

needs_new_jax = pytest.mark.skipif(
  jax.__version_info__ < (0, 11, 2),
  reason="older versions of JAX abort: .ci/run compiles these with the"
  " newest jax",
)
A100 = pytest.param("A100", marks=needs_new_jax)
# An H100 gets the program of an H200.
TARGETS = (A100, "H200", "B200")
# With and without a TMA.
KINDS = (A100, "H200")
DIRECTIONS = ("forward", "backward")
OPS = [case.name for case in CASES if case.is_for_every_gpu]
# What a program may have, in bytes.
MOST_SMEM = {
  "A100": 166_912,
  "L4": 101_376,
  "H200": 232_448,
  "B200": 232_448,
}
# Channels of the MLPs that have kernels on a Hopper: at three stages of tiny
# and at two of base.
WIDTHS = (64, 128, 256, 96, 192)
# Where a kernel of its own makes the weights' cotangents; at 64 channels the
# one backward kernel makes them too.
WEIGHTS_WIDTH = 128
# Blocks of tiny's stages in a whole program. One block has all of a stage's
# kernels, and each kernel takes seconds to compile.
DEPTHS = (1, 1, 1, 1)
BLOCKS_WITH_MLPS, BLOCKS_WITH_WEIGHTS = sum(DEPTHS[:3]), DEPTHS[1]
# [B, H, W, D, N] at the first and the last stage of tiny, at stage 1 of base,
# in images of 800 x 1280 pixels, and off the sizes of a register.
SHAPES = (
  (128, 56, 56, 128, 1),
  (128, 7, 7, 1024, 1),
  (128, 56, 56, 192, 1),
  (16, 200, 320, 128, 1),
  (128, 12, 61, 96, 1),
)
# Of these in float32: those that fit, and are cut, otherwise.
WIDE = SHAPES[-2:]
# So few programs that tokens and rows are cut: a kernel more for each scan.
SINGLE = ((1, 56, 56, 128, 1), (1, 14, 14, 512, 1))


def count(target, op, direction):
  """How many kernels a pass of an operator has."""
  case = by_name(op)
  counts = case.gpu_kernels
  if target == "A100" and case.older_gpu_kernels:
    counts = case.older_gpu_kernels
  return counts[DIRECTIONS.index(direction)]


def assert_kernels_compile(target, *arguments):
  """Returns how many there are."""
  return compiled_kernels(target, *arguments)["kernels"]


def compiled_kernels(target, *arguments):
  """What `benchmarks.aot` says of kernels, which fit and do not spill."""
  record = compiled("kernel", *arguments, "--target", target)
  assert record["kernels"] == len(record["programs"])
  for program in record["programs"]:
    assert program["spilled_bytes"] == 0, program
    assert program["smem_bytes"] <= MOST_SMEM[target], program
  return record


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [(shape, "bfloat16") for shape in SHAPES]
  + [(shape, "float32") for shape in (*WIDE, (1, 1, 1, 1, 1))],
  ids=str,
)
@pytest.mark.parametrize("target", KINDS)
def test_the_fused_operator_at_every_shape(target, shape, dtype, direction):
  assert_kernels_compile(
    *(target, "structure_aware_ssm", direction),
    *("--dtype", dtype, "--shape", *shape),
  )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_generation(target, op, direction):
  kernels = assert_kernels_compile(target, op, direction)
  assert kernels == count(target, op, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SINGLE, ids=str)
@pytest.mark.parametrize("target", KINDS)
def test_one_image(target, shape, direction):
  kernels = assert_kernels_compile(
    target, "structure_aware_ssm", direction, "--shape", *shape
  )
  assert kernels > count(target, "structure_aware_ssm", direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("states", [3, 16])
@pytest.mark.parametrize("target", KINDS)
def test_several_states(target, states, direction):
  assert_kernels_compile(
    target, "selective_scan", direction, "--shape", 128, 14, 14, 512, states
  )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("states", [1, 3, 5, 16])
@pytest.mark.parametrize("target", KINDS)
def test_selective_ssm(target, states, direction):
  """States whose pieces of code are as long as registers allow."""
  record = compiled_kernels(
    target, "selective_ssm", direction, "--shape", 128, 14, 14, 512, states
  )
  if target == "H200" and (states, direction) in SELECTIVE_SSM_BYTES:
    size = SELECTIVE_SSM_BYTES[states, direction]
    assert_golden(record, {"kernels": 1, "moved_bytes": size})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", KINDS)
def test_selective_ssm_in_chunks(target, direction):
  kernels = assert_kernels_compile(
    *(target, "selective_ssm", direction),
    *("--shape", 1, 14, 13, 130, 16, "--dtype", "float32"),
  )
  assert kernels == 2


@needs_new_jax
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
  ("op", "size"),
  [("selective_scan", 56), ("selective_ssm", 7), ("structure_aware_ssm", 7)],
)
def test_little_shared_memory(op, size, direction):
  shape = (128, size, size, 1024, 1)
  assert_kernels_compile("L4", op, direction, "--shape", *shape)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
  "shape",
  [(128, 28, 28, 2 * channels, 1) for channels in WIDTHS]
  # Tokens of which copies ask for more.
  + [(1, 14, 14, 512, 1), (1, 7, 13, 256, 1), (1, 1, 1, 128, 1)]
  + [(1, 1, 1, 64, 1)],
  ids=str,
)
def test_mlp(shape, direction):
  kernels = assert_kernels_compile("H200", "mlp", direction, "--shape", *shape)
  makes_weights = shape[3] == 2 * WEIGHTS_WIDTH and direction == "backward"
  assert kernels == 1 + makes_weights


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  ("op", "shape"),
  [
    ("projected_depthwise_conv", (128, 28, 28, 256, 1)),
    ("projected_depthwise_conv", (128, 14, 14, 512, 1)),
    ("projected_depthwise_conv", (128, 56, 56, 192, 1)),
    ("projected_depthwise_conv", (16, 200, 320, 128, 1)),
    ("projected_depthwise_conv", (1, 12, 61, 96, 1)),
    ("silu_depthwise_conv", (128, 7, 7, 1024, 1)),
    ("residual_depthwise_conv", (128, 56, 56, 64, 1)),
    ("residual_depthwise_conv", (128, 14, 14, 256, 1)),
    ("residual_depthwise_conv", (1, 1, 1, 1, 1)),
  ],
  ids=str,
)
def test_depthwise_conv(op, shape, dtype):
  kernels = assert_kernels_compile(
    "H200", op, "backward", "--shape", *shape, "--dtype", dtype
  )
  assert kernels == 1


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", ["residual_layer_norm", "gated_layer_norm"])
@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((128, 56, 56, 64, 1), "bfloat16"),
    ((128, 56, 56, 96, 1), "bfloat16"),
    ((128, 14, 14, 768, 1), "bfloat16"),
    # As many as there may be, and tokens that are not as many as come together.
    ((1, 7, 7, 1024, 1), "float32"),
  ],
  ids=str,
)
def test_layer_norm(op, shape, dtype, direction):
  kernels = assert_kernels_compile(
    "H200", op, direction, "--shape", *shape, "--dtype", dtype
  )
  assert kernels == 1


@pytest.mark.parametrize(
  ("shape", "dtype"),
  [
    ((128, 56, 56, 512, 1), "bfloat16"),
    ((128, 14, 14, 2048, 1), "float32"),
    # Fewer images than a warpgroup has at a time.
    ((3, 27, 9, 96, 1), "float32"),
  ],
  ids=str,
)
@pytest.mark.parametrize("target", KINDS)
def test_relu_depthwise_conv(target, shape, dtype):
  """The kernel has as many registers as it may, and spills none."""
  kernels = assert_kernels_compile(
    *(target, "relu_depthwise_conv", "backward"),
    *("--shape", *shape, "--dtype", dtype),
  )
  assert kernels == 1


def assert_kernels_of_a_step(target, record):
  # In each block, with its three convolutions, and three norms.
  ssm = [count(target, "structure_aware_ssm", x) for x in DIRECTIONS]
  kernels = sum(ssm) + 3 + 2 * 3
  # And three convolutions with a stride.
  expected = sum(DEPTHS) * kernels + 3
  if target == "H200":
    expected += 2 * BLOCKS_WITH_MLPS + BLOCKS_WITH_WEIGHTS
  if target == "A100":
    # The scan that begins both passes runs once. In the blocks of the first
    # stage two convolutions are XLA's, for their 64 channels.
    expected -= sum(DEPTHS) + 2 * DEPTHS[0]
  assert record["kernels"] == expected


# An H200's is in `test_collectives`.
@needs_new_jax
def test_sharded_training_step_on_an_a100():
  record = compiled(
    *("step", "--target", "A100:4", "--batch-size", 128),
    *("--depths", *DEPTHS),
  )
  assert_kernels_of_a_step("A100", record)
  assert record["all_gathers"] == 0


def test_bytes_and_launches_of_inference():
  record = compiled(
    *("inference", "--target", "H200", "--batch-size", 128),
    *("--depths", *DEPTHS),
  )
  assert_golden(record, INFERENCE_H200)
