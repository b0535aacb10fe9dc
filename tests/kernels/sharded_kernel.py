"""Run by test_mosaic_tpu on four CPU devices: kernels over a mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import spatial_mamba_kernels as smk
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from spatial_mamba_kernels.tpu import plan as tpu_plan

pl.pallas_call = partial(pl.pallas_call, interpret=True)
tpu_plan.CONFIG = tpu_plan.Config(tile=4, row=5)
BATCH, HEIGHT, WIDTH, CHANNELS, STATES = 4, 3, 4, 6, 2

# Axes of each argument: images over "data", channels over "model".
IMAGE = PartitionSpec("data", None, None, "model")
NUMBERS = PartitionSpec("data")
CHANNEL = PartitionSpec("model")


def arguments():
  """{name: (array, how it is split)}."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  pixels = BATCH, HEIGHT, WIDTH
  stencil = PartitionSpec(None, None, None, "model")
  return {
    "u": (normal(*pixels, CHANNELS), IMAGE),
    "delta": (normal(*pixels, CHANNELS), IMAGE),
    "A": (-jnp.exp(normal(CHANNELS, STATES)), CHANNEL),
    "B": (normal(*pixels, STATES), NUMBERS),
    "C": (normal(*pixels, STATES), NUMBERS),
    "D": (normal(CHANNELS), CHANNEL),
    "kernels": (normal(3, 3, 3, CHANNELS), stencil),
    "alpha": (normal(3), PartitionSpec()),
    "delta_bias": (normal(CHANNELS), CHANNEL),
  }


def operators(implementation):
  """{name: function of all arguments}; what one does not need is left out."""

  def scan(u, delta, A, B, delta_bias, **_):
    u, delta, B = (x[:, 0] for x in (u, delta, B))
    return smk.selective_scan(
      u,
      delta,
      A,
      B,
      delta_bias=delta_bias,
      h0=jnp.stack([u[:, 0]] * STATES, axis=-1),
      implementation=implementation,
    )

  def scan_and_observe(u, delta, A, B, C, D, delta_bias, **_):
    u, delta, B, C = (x[:, 0] for x in (u, delta, B, C))
    return smk.selective_ssm(
      u,
      delta,
      A,
      B,
      C,
      D,
      delta_bias=delta_bias,
      implementation=implementation,
    )

  def fuse(u, kernels, alpha, **_):
    return smk.state_fusion(u, kernels, alpha, implementation=implementation)

  return (
    partial(smk.structure_aware_ssm, implementation=implementation),
    scan,
    scan_and_observe,
    fuse,
  )


def value_and_gradients(operator, arrays):
  """The result, and the cotangents of all arguments."""
  result, pullback = jax.vjp(lambda arrays: operator(**arrays), arrays)
  g = jnp.cos(jnp.arange(result.size, dtype=jnp.float32))
  return result, pullback(g.reshape(result.shape))[0]


def assert_close(actual, expected):
  """To the rounding of sums of some hundred terms."""
  error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
  assert error <= 2e-6 * scale, (error, scale)


def main():
  mesh = jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
  )
  whole = {name: array for name, (array, _) in arguments().items()}
  split = {
    name: jax.device_put(array, NamedSharding(mesh, spec))
    for name, (array, spec) in arguments().items()
  }
  for kernel, sequential in zip(
    operators("mosaic_tpu"), operators("sequential"), strict=True
  ):
    with jax.set_mesh(mesh):
      actual = jax.jit(partial(value_and_gradients, kernel))(split)
    assert len(actual[0].sharding.device_set) == 4
    expected = value_and_gradients(sequential, whole)
    jax.tree.map(assert_close, *jax.device_get((actual, expected)))


if __name__ == "__main__":
  main()
