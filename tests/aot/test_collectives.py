"""The collectives of compiled steps are those that the sharding's rule says."""

import functools
import math

import pytest

from benchmarks import network
from benchmarks.tpu_static import compiled
from spatial_mamba_jax.models.pure import PureModel, is_stacked
from spatial_mamba_jax.training.shard_vector import sharded_axis
from tests.aot.golden import COLLECTIVES, TOLERANCE

pytestmark = pytest.mark.aot

# Images a device, and options of the compiler.
OPTIONS = {
  "v5e:16x16": ("--batch-size", 8, "--optimization-level", "O0"),
  "H200:8": ("--batch-size", 128),
}
DEVICES = {"v5e:16x16": 256, "H200:8": 8}


@functools.cache
def collectives(target, shards):
  record = compiled(
    "step", "--target", target, "--fsdp", shards, *OPTIONS[target]
  )
  return {kind: tuple(x) for kind, x in record["collectives"].items()}


@functools.cache
def sizes(shards):
  """Bytes in float32 of tiny's sharded parameters in blocks and outside of
  them, and of those that stay whole."""
  config = network.experiment(
    "spatial_mamba_tiny", batch_size=8, dtype="bfloat16", implementation=""
  )
  shapes = PureModel(config.create_task().network).shapes.params
  found = {"blocks": 0, "rest": 0, "whole": 0}
  for name, x in shapes.items():
    where = "blocks" if is_stacked(name) else "rest"
    is_whole = sharded_axis(name, x.shape, shards) is None
    found["whole" if is_whole else where] += 4 * math.prod(x.shape)
  return found


@pytest.mark.parametrize(("target", "shards"), COLLECTIVES)
def test_golden(target, shards):
  expected = COLLECTIVES[target, shards]
  found = collectives(target, shards)
  assert {kind: count for kind, (count, _) in found.items()} == {
    kind: count for kind, (count, _) in expected.items()
  }
  for kind, (_, sent) in expected.items():
    assert found[kind][1] == pytest.approx(sent, rel=TOLERANCE), kind


@pytest.mark.parametrize("target", DEVICES)
def test_whole_parameters_are_summed_and_not_gathered(target):
  """Gradients are bfloat16 where they are of products, else float32."""
  found = collectives(target, 1)
  assert "all-gather" not in found
  assert "reduce-scatter" not in found
  count = DEVICES[target]
  whole = sizes(1)["whole"]
  _, sent = found["all-reduce"]
  reduced = sent / (2 * (count - 1) / count)
  assert whole / 2 < reduced < whole


@pytest.mark.parametrize("target", DEVICES)
def test_sharded_parameters_are_gathered_in_each_pass(target):
  """On a TPU the backward pass gathers a block's parameters again."""
  size = sizes(8)
  passes = 2 if target.startswith("v5e") else 1
  expected = (passes * size["blocks"] + size["rest"]) * 7 / 8
  _, sent = collectives(target, 8)["all-gather"]
  assert sent == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("target", DEVICES)
def test_sharded_gradients_are_summed_into_shards(target):
  """All that leaves a device for sums is less than whole gradients would be.

  Where the compiler sums the whole array and keeps a shard, that counts as an
  all-reduce.
  """
  size, found = sizes(8), collectives(target, 8)
  sharded = (size["blocks"] + size["rest"]) * 7 / 8
  _, scattered = found["reduce-scatter"]
  assert 0.3 * sharded < scattered < sharded
  _, sent = found["all-reduce"]
  _, without = collectives(target, 1)["all-reduce"]
  assert sent < 0.4 * without
