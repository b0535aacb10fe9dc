"""FLOP counted in jaxprs, against closed forms."""

import jax
import jax.numpy as jnp
import pytest
import spatial_mamba_kernels as smk

from benchmarks import network
from spatial_mamba_jax.models.flops import count_flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def of_network(model, size, implementation=""):
  config = network.experiment(
    model, batch_size=1, dtype="float32", implementation=implementation
  )
  function, state = network.inference(config)
  flops = count_flops(function, state, shape(1, size, size, 3))
  return flops, network.forward_flops(config.model.build(), size)


def test_a_network():
  flops, closed_form = of_network("spatial_mamba_tiny", 224)
  assert flops == pytest.approx(closed_form, rel=0.01)


@pytest.mark.parametrize("implementation", ["sequential", "associative"])
def test_all_implementations_count_the_same(implementation):
  flops, _ = of_network("spatial_mamba_micro", 32, implementation)
  assert flops == of_network("spatial_mamba_micro", 32)[0]


def test_products_and_convolutions():
  assert count_flops(jnp.matmul, shape(5, 2, 3), shape(5, 3, 7)) == 420

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (2, 2),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=2,
    )

  # 4 x 4 pixels of 6 features, each of 9 taps of 2 channels.
  flops = count_flops(convolve, shape(1, 8, 8, 4), shape(3, 3, 2, 6))
  assert flops == 2 * (4 * 4 * 6) * (9 * 2)


def test_a_loop_counts_each_iteration_and_a_conditional_the_worst_branch():
  def function(x):
    def body(x, _):
      return x @ x, None

    looped, _ = jax.lax.scan(body, x, length=5)
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x, looped)

  assert count_flops(jax.checkpoint(function), shape(2, 2)) == (5 + 2) * 16


def test_a_scan_counts_three_multiply_adds_a_state():
  tokens, channels, states = 12, 8, 4
  flops = count_flops(
    jax.vmap(lambda u, B: smk.selective_scan(u, u, -jnp.ones((8, 4)), B)),
    shape(3, 1, tokens, channels),
    shape(3, 1, tokens, states),
  )
  assert flops == 3 * 6 * tokens * channels * states


def test_a_named_kernel_is_refused():
  def function(x):
    stencil = jnp.ones((3, 3, 3, 8)), jnp.ones(3)
    return smk.state_fusion(x, *stencil, implementation="mosaic_gpu")

  with pytest.raises(NotImplementedError, match="name no implementation"):
    count_flops(function, shape(1, 8, 8, 8))
