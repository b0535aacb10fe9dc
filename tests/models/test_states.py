"""The states of a block against the reference operators and the authors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk
from flax import nnx
from spatial_mamba_kernels.selective_scan.reference import selective_scan
from spatial_mamba_kernels.state_fusion.reference import state_fusion

import spatial_mamba_jax as smj
from spatial_mamba_jax.models.mixers import StructureAwareSSM

block_states = nnx.jit(smj.block_states, static_argnames=("stage", "block"))


def create(make=smj.create_model, **overrides):
  """A small model with random fusion weights."""
  settings = {"dims": (4, 6), "depths": (1, 2), "d_state": 3, **overrides}
  if make is smj.create_backbone:
    settings["out_indices"] = (0, 1)
  model = make("spatial_mamba_micro", rngs=nnx.Rngs(0), **settings)
  rng = np.random.default_rng(0)
  for stage in model.stages:
    for block in stage.blocks:
      for weight in (block.mixer.fusion.kernels, block.mixer.fusion.alpha):
        weight[...] = rng.normal(size=weight.shape)
  return model


@nnx.jit
def reference_states(mixer, x):
  """Returns (before, after, observation) by the reference equations."""
  x = jnp.split(mixer.in_proj(x), 2, axis=-1)[0]
  conv = mixer.conv
  y = smk.depthwise_conv(x, conv.kernel[...])
  u = jax.nn.silu(y + conv.bias[None, None, None])
  dt_low, B, C = jnp.split(mixer.x_proj(u), mixer.splits, axis=-1)
  A = -jnp.exp(mixer.A_log[...])
  batch, height, width, _ = u.shape
  before = selective_scan(
    u.reshape(batch, height * width, -1),
    mixer.dt_proj(dt_low).reshape(batch, height * width, -1),
    A,
    B.reshape(batch, height * width, -1),
    delta_bias=mixer.dt_bias[...],
  ).reshape(batch, height, width, *A.shape)
  after = jnp.stack(
    [
      state_fusion(
        before[..., n], mixer.fusion.kernels[...], mixer.fusion.alpha[...]
      )
      for n in range(A.shape[1])
    ],
    axis=-1,
  )
  observed = jnp.sum(C[..., None, :] * after, -1)
  return before, after, observed + mixer.D[None, None, None] * u


def compare(ours, reference):
  """Compares at the rounding of the largest state."""
  scale = np.abs(reference).max()
  np.testing.assert_allclose(ours, reference, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.usefixtures("x64")
def test_every_block_against_the_reference(monkeypatch):
  model = create(dtype=jnp.float64)
  images = np.random.default_rng(1).normal(size=(2, 21, 18, 3))
  forward = StructureAwareSSM.__call__

  @nnx.jit
  def mixer_inputs(model, images):
    inputs = []

    def spy(mixer, x, branch_scale):
      inputs.append(x)
      return forward(mixer, x, branch_scale)

    with monkeypatch.context() as patch:
      patch.setattr(StructureAwareSSM, "__call__", spy)
      model(images)
    return inputs

  inputs = mixer_inputs(model, images)
  for (stage, block), x in zip([(0, 0), (1, 0), (1, 1)], inputs, strict=True):
    states = block_states(model, images, stage, block)
    mixer = model.stages[stage].blocks[block].mixer
    before, after, _ = reference_states(mixer, x)
    assert states.before.shape == (2, *x.shape[1:3], 2 * x.shape[3], 3)
    compare(states.before, before)
    compare(states.after, after)
    assert np.abs(states.after - states.before).max() > 1e-5


@pytest.mark.usefixtures("x64")
def test_states_are_what_the_authors_observe(golden, named_weights):
  """The states give the authors' output of the mixer."""
  g = golden("modules")
  model = smj.create_model(
    "spatial_mamba_micro",
    rngs=nnx.Rngs(0),
    dims=(32, 64),
    depths=(1, 1),
    dtype="float64",
  )
  path = "layers.0.blocks.0.self_attention."
  shapes = {k: v.shape for k, v in smj.convert.to_torch(model).items()}
  weights = {
    path + local: named_weights.named_weight(local, shapes[path + local], 1)
    for local in g["ssm_names"]
  }
  smj.convert.from_torch(model, weights, strict=False)
  mixer = model.stages[0].blocks[0].mixer
  x = jnp.asarray(g["ssm_x"])
  states = nnx.jit(StructureAwareSSM.states)(mixer, x)
  before, after, observed = reference_states(mixer, x)
  compare(states.before, before)
  compare(states.after, after)
  gate = jax.nn.silu(jnp.split(mixer.in_proj(x), 2, axis=-1)[1])
  y = mixer.out_proj(mixer.norm(observed) * gate)
  np.testing.assert_allclose(y, g["ssm_y_eval"], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_float32(dtype):
  model = create(dtype=dtype)
  images = jnp.ones((1, 16, 8, 3))
  states = nnx.eval_shape(lambda: smj.block_states(model, images, 1, 1))
  assert states.before.shape == states.after.shape == (1, 2, 1, 12, 3)
  assert states.before.dtype == states.after.dtype == jnp.float32


def test_a_backbone_has_the_same_states():
  images = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(1, 8, 8, 3)
  ours = block_states(create(), images, 0, 0)
  backbones = block_states(create(smj.create_backbone), images, 0, 0)
  np.testing.assert_array_equal(backbones, ours)


def test_the_forward_pass_is_the_same_program():
  """`block_states` changes nothing in the model."""
  model = create()
  images = jnp.ones((1, 16, 16, 3))

  def lowered(graphdef, state):
    program = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return program.lower(state, images)

  before = nnx.split(model)
  block_states(model, images, 1, 1)
  after = nnx.split(model)
  assert after[0] == before[0]
  program = lowered(*after)
  assert program.as_text() == lowered(*before).as_text()
  assert jax.tree.structure(program.out_info).num_leaves == 1


@pytest.mark.parametrize("place", [(2, 0), (0, 1), (1, 2), (-1, 0), (0, -1)])
def test_no_such_block(place):
  with pytest.raises(ValueError, match=r"no block .* have \(1, 2\) blocks"):
    smj.block_states(create(), jnp.ones((1, 8, 8, 3)), *place)


def test_a_wrong_call_is_explained():
  model = create()
  with pytest.raises(ValueError, match=r"must have shape \[B, H, W, 3\]"):
    smj.block_states(model, jnp.ones((8, 8, 3)), 0, 0)
  model.train()
  with pytest.raises(ValueError, match="call model"):
    smj.block_states(model, jnp.ones((1, 8, 8, 3)), 0, 0)
