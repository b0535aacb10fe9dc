"""Mixers as matrices: what they are, and what they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk
from flax import nnx

from spatial_mamba_jax import theory
from spatial_mamba_jax.models import ModelConfig
from spatial_mamba_jax.models.mixers.structure_aware import (
  StructureAwareConfig,
)

BATCH, HEIGHT, WIDTH, CHANNELS = 2, 9, 7, 3
TOKENS = HEIGHT * WIDTH
DILATIONS = (1, 3, 5)

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape))


def apply(M, x):
  """M x, channel by channel: [B, L, D]."""
  return jnp.einsum("bdts,bsd->btd", M, x)


def assert_close(actual, expected, tolerance=1e-12):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def operands(states):
  dt = jax.nn.softplus(normal(BATCH, TOKENS, CHANNELS) - 1)
  A = -jnp.exp(normal(CHANNELS, states))
  B, C = normal(BATCH, TOKENS, states), normal(BATCH, TOKENS, states) + 1
  return dt, A, B, C


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("A", (1, 1)),
    ("B", (1, TOKENS, 1)),
    ("C", (BATCH, 1, 1)),
    ("D", (1,)),
    ("fusion", (CHANNELS, TOKENS, 1)),
  ],
)
def test_a_wrong_shape_is_named(name, shape):
  arrays = dict(zip(("dt", "A", "B", "C"), operands(1), strict=True))
  arrays[name] = normal(*shape)
  with pytest.raises(ValueError, match=f"mixing_matrix: {name} must have"):
    theory.mixing_matrix(**arrays)


@pytest.mark.parametrize(
  ("kernels", "alpha", "name"),
  [
    ((3, 3, 3, 2), (1,), "alpha"),
    ((1, 3, 3, 2), (3,), "kernels"),
    ((3, 5, 5, 2), (3,), "kernels"),
  ],
)
def test_a_wrong_stencil_is_named(kernels, alpha, name):
  with pytest.raises(ValueError, match=f"fusion_matrix: {name} must have"):
    theory.fusion_matrix(normal(*kernels), normal(*alpha), height=2, width=2)


def test_linear_attention_is_its_matrix():
  """A token attends to the tokens before it, without a softmax."""
  keys, queries = normal(BATCH, TOKENS, 4), normal(BATCH, TOKENS, 4) + 1
  x = normal(BATCH, TOKENS, CHANNELS)
  dt, A = jnp.ones_like(x), jnp.zeros((CHANNELS, 4))
  M = theory.mixing_matrix(dt, A, keys, queries)
  scores = np.tril(np.einsum("btn,bsn->bts", queries, keys))
  assert_close(apply(M, x), np.einsum("bts,bsd->btd", scores, x))


@pytest.mark.parametrize("states", [1, 3])
def test_mamba_is_its_matrix(states):
  dt, A, B, C = operands(states)
  D, x = normal(CHANNELS), normal(BATCH, TOKENS, CHANNELS)
  delta = jnp.log(jnp.expm1(dt))
  h = smk.selective_scan(x, delta, A, B)
  y = jnp.einsum("btdn,btn->btd", h, C) + D * x
  M = theory.mixing_matrix(dt, A, B, C, D=D)
  assert_close(apply(M, x), y)
  assert not np.triu(M, 1).any()  # Causal.
  # Semiseparable: the past reaches the future through N numbers.
  for t in (1, 20, TOKENS - 1):
    block = np.asarray(M[:, :, t:, :t])
    assert np.linalg.matrix_rank(block).max() == min(states, t, TOKENS - t)


@pytest.mark.parametrize("states", [1, 2])
def test_spatial_mamba_is_its_matrix(states):
  dt, A, B, C = operands(states)
  D, x = normal(CHANNELS), normal(BATCH, TOKENS, CHANNELS)
  kernels, alpha = normal(3, 3, 3, CHANNELS), normal(3)
  fusion = theory.fusion_matrix(kernels, alpha, height=HEIGHT, width=WIDTH)
  M = theory.mixing_matrix(dt, A, B, C, D=D, fusion=fusion)

  def image(tokens):
    return tokens.reshape(BATCH, HEIGHT, WIDTH, -1)

  delta = jnp.log(jnp.expm1(dt))
  y = smk.structure_aware_ssm(
    image(x), image(delta), A, image(B), image(C), D, kernels, alpha
  )
  assert_close(image(apply(M, x)), y)

  # A token sees those that come later only within the reach of its stencil.
  reach = max(DILATIONS) * (WIDTH + 1)
  assert not np.triu(M, reach + 1).any()
  assert np.triu(M, reach).any()
  # Beyond the reach, the past comes through the N states again.
  t = TOKENS - 2
  block = np.asarray(M[:, :, t:, : t - reach])
  assert np.linalg.matrix_rank(block).max() == min(states, 2)


def test_the_support_of_a_stencil():
  """Of a token far from the border: 25 pixels, the centre of all dilations."""
  kernels, alpha = jnp.ones((3, 3, 3, 1)), jnp.ones(3)
  (fusion,) = theory.fusion_matrix(kernels, alpha, height=13, width=12)
  row = np.asarray(fusion)[6 * 12 + 6].reshape(13, 12)
  offsets = {(int(r) - 6, int(c) - 6) for r, c in np.argwhere(row)}
  steps = (-1, 0, 1)
  assert offsets == {
    (d * r, d * c) for d in DILATIONS for r in steps for c in steps
  }
  assert row[6, 6] == 3
  assert row.sum() == 27
  # In a corner, what lies outside counts for the border.
  assert np.asarray(fusion)[0].sum() == 27


def test_spatial_mamba_without_neighbours_is_mamba():
  dt, A, B, C = operands(2)
  centre = jnp.zeros((3, 3, 3, CHANNELS)).at[:, 1, 1].set(1)
  alpha = jnp.asarray([0.5, 0.2, 0.3])
  fusion = theory.fusion_matrix(centre, alpha, height=HEIGHT, width=WIDTH)
  assert_close(fusion, np.broadcast_to(np.eye(TOKENS), fusion.shape))
  ours = theory.mixing_matrix(dt, A, B, C, fusion=fusion)
  assert_close(ours, theory.mixing_matrix(dt, A, B, C))


def test_mamba_without_decay_is_linear_attention():
  """As A goes to 0, at first order in A."""
  dt, A, B, C = operands(3)
  attention = theory.mixing_matrix(jnp.ones_like(dt), 0 * A, B, C)
  # The time step scales the keys.
  attention = attention * jnp.einsum("bsd->bds", dt)[:, :, None]
  assert_close(theory.mixing_matrix(dt, 0 * A, B, C), attention)
  errors = [
    np.abs(theory.mixing_matrix(dt, scale * A, B, C) - attention).max()
    for scale in (1e-6, 1e-7)
  ]
  assert errors[0] / errors[1] == pytest.approx(10, rel=1e-2)


def test_the_jacobian_of_a_mixer_is_its_matrix():
  config = ModelConfig(
    dims=(2,),
    depths=(1,),
    mixer=StructureAwareConfig(d_state=2),
    dtype="float64",
  )
  mixer = config.mixer.create(2, None, config=config, rngs=nnx.Rngs(0))
  mixer.fusion.kernels[...] = normal(*mixer.fusion.kernels.shape)
  values, operands = mixer.select(normal(BATCH, HEIGHT, WIDTH, 2))
  delta, A, B, C = operands

  def tokens(x):
    return x.reshape(BATCH, TOKENS, -1)

  M = theory.mixing_matrix(
    jax.nn.softplus(tokens(delta) + mixer.dt_bias[...]),
    A,
    tokens(B),
    tokens(C),
    D=mixer.D[...],
    fusion=theory.fusion_matrix(
      mixer.fusion.kernels[...],
      mixer.fusion.alpha[...],
      height=HEIGHT,
      width=WIDTH,
    ),
  )
  rows = theory.mixing_rows(mixer.mix, values, operands, range(TOKENS))
  jacobian = rows.reshape(TOKENS, BATCH, TOKENS, -1).transpose(1, 3, 0, 2)
  assert_close(jacobian, M)
  # It is the Jacobian whatever is mixed.
  y = mixer.mix(values, operands)
  assert_close(tokens(y), apply(jacobian, tokens(values)))
