"""The collectives of compiled steps are those that the sharding's rule says."""

import math

import pytest

from benchmarks import network
from benchmarks.tpu_static import compiled
from spatial_mamba_jax.models.pure import PureModel, is_stacked
from spatial_mamba_jax.training.shard_vector import sharded_axis
from tests.aot import golden
from tests.aot.golden import COLLECTIVES, STEP_H200, TOLERANCE
from tests.aot.test_gpu import DEPTHS, assert_kernels_of_a_step

pytestmark = pytest.mark.aot

# Images a device, and options of the compiler.
OPTIONS = {
  "v5e:16x16": ("--batch-size", 8, "--optimization-level", "O0"),
  "H200:8": ("--batch-size", 128, "--depths", *DEPTHS),
}


def step(target, shards):
  return compiled(
    "step", "--target", target, "--fsdp", shards, *OPTIONS[target]
  )


def collectives_of(record):
  return {kind: tuple(x) for kind, x in record["collectives"].items()}


def sizes(target, shards):
  """Bytes in float32 of tiny's sharded parameters in blocks and outside of
  them, and of those that stay whole."""
  config = network.experiment(
    "spatial_mamba_tiny", batch_size=8, dtype="bfloat16", implementation=""
  )
  if target.startswith("H200"):
    config.model.depths = DEPTHS
  shapes = PureModel(config.create_task().network).shapes.params
  found = {"blocks": 0, "rest": 0, "whole": 0}
  for name, x in shapes.items():
    where = "blocks" if is_stacked(name) else "rest"
    is_whole = sharded_axis(name, x.shape, shards) is None
    found["whole" if is_whole else where] += 4 * math.prod(x.shape)
  return found


def assert_golden(found, target, shards):
  expected = COLLECTIVES[target, shards]
  assert {kind: count for kind, (count, _) in found.items()} == {
    kind: count for kind, (count, _) in expected.items()
  }
  for kind, (_, sent) in expected.items():
    assert found[kind][1] == pytest.approx(sent, rel=TOLERANCE), kind


def assert_gathered_and_scattered(fsdp, size, *, passes):
  """Sharded parameters are gathered in each pass."""
  expected = (passes * size["blocks"] + size["rest"]) * 7 / 8
  assert fsdp["all-gather"][1] == pytest.approx(expected, rel=TOLERANCE)
  # Their gradients are summed into shards. Where the compiler sums a whole
  # array and keeps a shard, that counts as an all-reduce.
  sharded = (size["blocks"] + size["rest"]) * 7 / 8
  assert 0.3 * sharded < fsdp["reduce-scatter"][1] < sharded


def test_collectives_of_tpus():
  target, chips = "v5e:16x16", 256
  data, fsdp = (collectives_of(step(target, shards)) for shards in (1, 8))
  assert_golden(data, target, 1)
  assert_golden(fsdp, target, 8)

  # Whole parameters are summed and not gathered. Gradients are bfloat16 where
  # they are of products, else float32.
  assert "all-gather" not in data
  assert "reduce-scatter" not in data
  whole = sizes(target, 1)["whole"]
  _, sent = data["all-reduce"]
  assert whole / 2 < sent / (2 * (chips - 1) / chips) < whole

  # The backward pass gathers a block's parameters again.
  assert_gathered_and_scattered(fsdp, sizes(target, 8), passes=2)
  assert fsdp["all-reduce"][1] < 0.4 * sent


def test_collectives_of_gpus():
  """Also what else the program has, because it takes minutes to compile."""
  target = "H200:8"
  record = step(target, 8)
  assert_kernels_of_a_step("H200", record)
  golden.assert_golden(record, STEP_H200)
  fsdp = collectives_of(record)
  assert_golden(fsdp, target, 8)
  size = sizes(target, 8)
  assert_gathered_and_scattered(fsdp, size, passes=1)
  assert fsdp["all-reduce"][1] < 0.1 * (size["blocks"] + size["rest"])
