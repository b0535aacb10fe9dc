"""Kernels and training steps, compiled for TPUs by the real compiler.

Run by `make aot`, in an environment of its own with libtpu.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# [B, H, W, D, N] at the four stages of tiny, at stage 1 of base, in images of
# 512 x 512 and 800 x 1280 pixels, off the sizes of a register, and with states.
SHAPES = (
  (16, 56, 56, 128, 1),
  (16, 28, 28, 256, 1),
  (16, 14, 14, 512, 1),
  (16, 7, 7, 1024, 1),
  (16, 56, 56, 192, 1),
  (8, 128, 128, 128, 1),
  (8, 200, 320, 128, 1),
  (3, 5, 9, 96, 1),
  (1, 1, 1, 1, 1),
  (16, 14, 14, 512, 16),
)
V6E_MEMORY = 31.25 * 2**30


def compiled(*arguments):
  """What `benchmarks.aot` says; a crash of the compiler is its output."""
  process = subprocess.run(
    (sys.executable, "-m", "benchmarks.aot", *map(str, arguments)),
    capture_output=True,
    text=True,
    timeout=900,
    env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
  )
  assert process.returncode == 0, process.stderr[-2000:]
  return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_of_every_shape_fit_a_v5e(program, dtype, shape):
  record = compiled(program, "--dtype", dtype, "--shape", *shape)
  assert record["kernels"] == 1


@pytest.mark.parametrize("program", ["forward", "backward"])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_for_every_generation(program, target):
  record = compiled(program, "--target", target, "--shape", 16, 56, 56, 128, 1)
  assert record["kernels"] == 1


def test_sharded_training_step():
  record = compiled("step", "--target", "v6e:2x2", "--batch-size", 32)
  assert record["kernels"] == 8  # Forward and backward, of each stage.
  assert record["all_gathers"] == 0
  used = record["argument_bytes"] + record["temporary_bytes"]
  assert used < V6E_MEMORY
