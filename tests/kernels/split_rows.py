"""Run by test_over_rows on eight CPU devices: images split by their rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import spatial_mamba_kernels as smk
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spatial_mamba_jax.models import ModelConfig, SpatialMamba

BATCH, HEIGHT, WIDTH, CHANNELS, STATES = 2, 40, 3, 4, 2


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape))


def cases(implementation):
  """Yields (operator, arguments, names of those that are split by rows)."""
  pixels, tokens = (BATCH, HEIGHT, WIDTH), (BATCH, HEIGHT * WIDTH)
  A, bias = -jnp.exp(normal(CHANNELS, STATES)), normal(CHANNELS) - 3
  kernels, alpha = normal(3, 3, 3, CHANNELS), normal(3)
  yield (
    partial(
      smk.selective_scan, return_last=True, implementation=implementation
    ),
    {
      "u": normal(*tokens, CHANNELS),
      "delta": normal(*tokens, CHANNELS),
      "A": A,
      "B": normal(*tokens, STATES),
      "delta_bias": bias,
      "h0": normal(BATCH, CHANNELS, STATES),
    },
    ("u", "delta", "B"),
  )
  yield (
    partial(smk.state_fusion, implementation=implementation),
    {"h": normal(*pixels, CHANNELS), "kernels": kernels, "alpha": alpha},
    ("h",),
  )
  yield (
    partial(smk.structure_aware_ssm, implementation=implementation),
    {
      "u": normal(*pixels, CHANNELS),
      "delta": normal(*pixels, CHANNELS),
      "A": A,
      "B": normal(*pixels, STATES),
      "C": normal(*pixels, STATES),
      "D": normal(CHANNELS),
      "kernels": kernels,
      "alpha": alpha,
      "delta_bias": bias,
    },
    ("u", "delta", "B", "C"),
  )


def value_and_gradients(operator, arrays):
  result, pullback = jax.vjp(lambda arrays: operator(**arrays), arrays)
  g = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size * 1.0)), result)
  g = jax.tree.map(lambda g, x: g.reshape(x.shape), g, result)
  return result, pullback(g)[0]


def assert_close(actual, expected):
  error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
  assert error <= 1e-12 * scale, (error, scale)


def check(mesh, implementation):
  """Compares each operator and its gradients with one device's."""
  batch = "data" if "data" in mesh.axis_names else None
  for operator, arrays, split_names in cases(implementation):
    expected = jax.jit(partial(value_and_gradients, operator))(arrays)
    split = dict(arrays)
    for name in split_names:
      sharding = NamedSharding(mesh, PartitionSpec(batch, "rows"))
      split[name] = jax.device_put(arrays[name], sharding)
    with jax.set_mesh(mesh):
      run = jax.jit(partial(value_and_gradients, operator)).lower(split)
      compiled = run.compile()
      actual = compiled(split)
    jax.tree.map(assert_close, *jax.device_get((actual, expected)))
    # No device has the tokens of all.
    (result, *_), _ = jax.tree.flatten(actual)
    assert len({str(x.index) for x in result.addressable_shards}) == mesh.size
    print(operator.func.__name__, dict(mesh.shape), implementation, "ok")


def check_within_a_shard_map(mesh):
  """Compares gradients by a `shard_map` of the caller with one device's."""
  (_, arrays, split_names), *_ = cases(None)
  shards = {
    name: PartitionSpec("data" if name in (*split_names, "h0") else None)
    for name in arrays
  }

  def total(arrays, scan):
    return jnp.sum(jnp.sin(scan(arrays)))

  def scan(arrays):
    return smk.selective_scan(**arrays)

  split = jax.shard_map(
    scan, mesh=mesh, in_specs=(shards,), out_specs=PartitionSpec("data")
  )
  actual, expected = (
    jax.jit(jax.grad(partial(total, scan=form)))(arrays)
    for form in (split, scan)
  )
  jax.tree.map(assert_close, *jax.device_get((actual, expected)))


def check_model(mesh):
  """Compares a network's logits and gradients with one device's."""
  config = ModelConfig(
    dims=(4, 8), depths=(2, 1), num_classes=3, dtype="float64"
  )
  network = SpatialMamba(config, rngs=nnx.Rngs(0))
  graph, weights, rest = nnx.split(network, nnx.Param, ...)

  def logits(weights, x):
    return nnx.merge(graph, weights, rest)(x)

  def run(weights, x):
    y, pullback = jax.vjp(logits, weights, x)
    return y, pullback(jnp.cos(y))

  x = normal(2, 320, 16, 3)
  expected = jax.jit(run)(weights, x)
  split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "rows")))
  with jax.set_mesh(mesh):
    actual = jax.jit(run)(weights, split)
  jax.tree.map(assert_close, *jax.device_get((actual, expected)))


def main():
  jax.config.update("jax_enable_x64", True)
  types = AxisType.Auto, AxisType.Auto
  rows = jax.make_mesh((8,), ("rows",), axis_types=types[:1])
  both = jax.make_mesh((2, 4), ("data", "rows"), axis_types=types)
  check(rows, None)
  check(both, "associative")
  check_within_a_shard_map(both)
  check_model(both)


if __name__ == "__main__":
  main()
