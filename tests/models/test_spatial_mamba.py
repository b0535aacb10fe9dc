"""The models against the authors' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.models.config import get_model_config
from spatial_mamba_jax.models.spatial_mamba import Block, DownSampling, Stem
from spatial_mamba_jax.models.ssm import StructureAwareSSM

MICRO_SIZES = ["64x64", "96x64", "50x70"]


@nnx.jit
def apply(model, images):
  return model(images)


@pytest.fixture
def create(named_weights):
  """Creates a model, or a backbone, with the golden weights of seed 0."""

  def create(size, make=smj.create_model, **overrides):
    model = make(f"spatial_mamba_{size}", rngs=nnx.Rngs(1), **overrides)
    weights = named_weights.named_state_dict(size)
    smj.convert.from_torch(model, weights, strict=make is smj.create_model)
    return model

  return create


@pytest.fixture
def images(named_weights):
  """Golden images [B, H, W, 3] of a size such as 64x64."""

  def images(size, batch=2, seed=0):
    height, width = map(int, size.split("x"))
    return np.moveaxis(
      named_weights.named_images(batch, height, width, seed), 1, 3
    )

  return images


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", MICRO_SIZES)
def test_micro_logits_in_float64(create, images, golden, size):
  model = create("micro", dtype=jnp.float64)
  logits = apply(model, images(size))
  expected = golden("micro")[f"logits_{size}"]
  np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", [None, "sequential", "associative"])
def test_micro_logits_in_float32(create, images, golden, implementation):
  model = create("micro", implementation=implementation)
  logits = apply(model, images("50x70"))
  assert logits.dtype == jnp.float32
  expected = golden("micro")["logits_50x70"]
  np.testing.assert_allclose(logits, expected, atol=1e-4 * abs(expected).max())


def test_micro_logits_in_bfloat16(create, images, golden):
  model = create("micro", dtype=jnp.bfloat16)
  assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model))} == {
    "float32",
    "int32",
  }
  logits = apply(model, images("64x64"))
  assert logits.dtype == jnp.float32
  expected = golden("micro")["logits_64x64"]
  # Some 50 roundings to 2**-9 between image and logits.
  np.testing.assert_allclose(logits, expected, atol=0.05 * abs(expected).max())


@pytest.mark.parametrize("size", ["224x224", "160x256"])
def test_tiny_logits_in_float32(create, images, golden, size):
  logits = apply(create("tiny"), images(size))
  expected = golden("tiny")[f"logits_{size}"]
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def training_gradients(model, images, target):
  """(loss, logits, {torch name: gradient}, {torch name: statistic})."""
  model.train()
  graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

  @jax.jit
  def run(params, stats):
    def loss(params):
      model = nnx.merge(graphdef, params, stats, copy=True)
      logits = model(images)
      cross_entropy = -jnp.sum(target * jax.nn.log_softmax(logits), -1)
      return jnp.mean(cross_entropy), (logits, nnx.state(model, nnx.BatchStat))

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, (logits, stats)), gradients = run(params, stats)
  nnx.update(model, stats, gradients)
  return loss, logits, smj.convert.to_torch(model)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-4)]
)
def test_micro_gradients_and_statistics(
  create, images, golden, dtype, tolerance
):
  expected = golden("micro")
  with jax.enable_x64(dtype == "float64"):
    model = create("micro", dtype=dtype)
    batch = jnp.asarray(images("64x64"), dtype)
    target = jnp.asarray(expected["target"], dtype)
    loss, logits, arrays = training_gradients(model, batch, target)
  assert loss == pytest.approx(expected["train_loss"], rel=tolerance)
  scale = np.abs(expected["train_logits"]).max()
  np.testing.assert_allclose(
    logits, expected["train_logits"], atol=tolerance * scale, rtol=0
  )
  compared = [key for key in expected if key.startswith(("grad/", "stats/"))]
  largest = max(np.abs(expected[k]).max() for k in compared)
  for key in compared:
    name = key.split("/")[1]
    # A bias before a BatchNorm has no gradient but for rounding.
    scale = np.abs(expected[key]).max()
    if scale < 1e-12 * largest:
      scale = largest
    error = np.abs(arrays[name] - expected[key]).max()
    assert error <= tolerance * scale, key


@pytest.mark.usefixtures("x64")
def test_backbone_features(create, images, golden, named_weights):
  backbone = create("micro", smj.create_backbone, dtype=jnp.float64)
  outnorms = {
    f"outnorm{i}.{kind}": named_weights.named_weight(
      f"outnorm{i}.{kind}", (dim,)
    )
    for i, dim in enumerate(backbone.config.dims)
    for kind in ("weight", "bias")
  }
  smj.convert.from_torch(backbone, outnorms, strict=False)
  features = apply(backbone, images("64x64"))
  assert len(features) == 4
  for i, feature in enumerate(features):
    expected = np.moveaxis(golden("micro")[f"feature{i}"], 1, 3)
    np.testing.assert_allclose(feature, expected, rtol=1e-10, atol=1e-12)


def test_backbone_returns_the_stages_asked_for(create, images):
  backbone = create("micro", smj.create_backbone, out_indices=(1, 3))
  shapes = [x.shape for x in apply(backbone, images("50x70"))]
  assert shapes == [(2, 7, 9, 32), (2, 2, 3, 128)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
  ("name", "path", "make"),
  [
    (
      "ssm",
      "layers.0.blocks.0.self_attention.",
      lambda c, r: StructureAwareSSM(32, config=c, rngs=r),
    ),
    ("block", "layers.0.blocks.0.", lambda c, r: Block(32, config=c, rngs=r)),
    ("stem", "patch_embed.", lambda c, r: Stem(16, config=c, rngs=r)),
    (
      "down",
      "layers.0.downsample.",
      lambda c, r: DownSampling(16, 32, config=c, rngs=r),
    ),
  ],
)
def test_modules_are_the_authors(golden, named_weights, name, path, make, mode):
  g = golden("modules")
  config = get_model_config(
    "spatial_mamba_micro", dims=(32, 64), depths=(1, 1), dtype="float64"
  )
  if name in ("stem", "down"):
    config = get_model_config("spatial_mamba_micro", dtype="float64")
  model = smj.SpatialMamba(config, rngs=nnx.Rngs(0))
  shapes = {k: v.shape for k, v in smj.convert.to_torch(model).items()}
  weights = {
    path + local: named_weights.named_weight(local, shapes[path + local], 1)
    for local in g[f"{name}_names"]
  }
  smj.convert.from_torch(model, weights, strict=False)
  del make
  module = {
    "ssm": model.stages[0].blocks[0].mixer,
    "block": model.stages[0].blocks[0],
    "stem": model.stem,
    "down": model.downsamples[0],
  }[name]
  getattr(model, mode)()
  x = g[f"{name}_x"]
  x = np.moveaxis(x, 1, 3) if name == "stem" else x
  y = module(jnp.asarray(x))
  np.testing.assert_allclose(y, g[f"{name}_y_{mode}"], rtol=1e-10, atol=1e-11)
