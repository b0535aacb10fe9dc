"""The models against values of the authors' code."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from spatial_mamba_kernels.activations import gelu, relu, silu
from spatial_mamba_kernels.drop_path import drop_path
from spatial_mamba_kernels.gpu import device as gpu_device

import spatial_mamba_jax as smj
from spatial_mamba_jax.models import stage as stages
from spatial_mamba_jax.models.layers import drop_path_scales
from spatial_mamba_jax.models.norms import LayerNorm

MICRO_SIZES = ["64x64", "50x70"]


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


# On a CPU the default is "sequential".
@pytest.mark.parametrize("implementation", [None, "associative"])
def test_micro_logits_in_float32(create, images, golden, implementation):
  model = create("micro", implementation=implementation)
  logits = apply(model, images("96x64"))
  assert logits.dtype == jnp.float32
  expected = golden("micro")["logits_96x64"]
  np.testing.assert_allclose(
    logits, expected, atol=1e-4 * abs(expected).max(), rtol=0
  )


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


@pytest.mark.soak
def test_tiny_logits_in_float32(create, images, golden):
  size = "160x256"
  logits = apply(create("tiny"), images(size))
  expected = golden("tiny")[f"logits_{size}"]
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def training_gradients(model, images, target):
  """Returns loss, logits, {torch name: gradient}, {torch name: statistic}."""
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
  ("dtype", "tolerance"),
  [("float64", 1e-6), pytest.param("float32", 1e-4, marks=pytest.mark.soak)],
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
    # The gradient of a bias before a BatchNorm is 0 up to rounding.
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


def test_backbone_returns_the_requested_stages(create, images):
  backbone = create("micro", smj.create_backbone, out_indices=(1, 3))
  shapes = [x.shape for x in apply(backbone, images("50x70"))]
  assert shapes == [(2, 7, 9, 32), (2, 2, 3, 128)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
  ("name", "path", "dims"),
  [
    ("ssm", "layers.0.blocks.0.self_attention.", (32, 64)),
    ("block", "layers.0.blocks.0.", (32, 64)),
    ("stem", "patch_embed.", (16, 32)),
    ("down", "layers.0.downsample.", (16, 32)),
  ],
)
def test_modules_are_the_authors(golden, named_weights, name, path, dims, mode):
  g = golden("modules")
  model = smj.create_model(
    "spatial_mamba_micro",
    rngs=nnx.Rngs(0),
    dims=dims,
    depths=(1, 1),
    dtype="float64",
  )
  shapes = {k: v.shape for k, v in smj.convert.to_torch(model).items()}
  weights = {
    path + local: named_weights.named_weight(local, shapes[path + local], 1)
    for local in g[f"{name}_names"]
  }
  mismatch = smj.convert.from_torch(model, weights, strict=False)
  assert not mismatch.unexpected
  module = {
    "ssm": model.stages[0].blocks[0].mixer,
    "block": model.stages[0].blocks[0],
    "stem": model.stem,
    "down": model.downsamples[0],
  }[name]
  getattr(model, mode)()
  x = g[f"{name}_x"]
  x = np.moveaxis(x, 1, 3) if name == "stem" else x
  y = apply(module, jnp.asarray(x))
  np.testing.assert_allclose(y, g[f"{name}_y_{mode}"], rtol=1e-10, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_evaluation_follows_training(create, images):
  """The authors cache the merged fusion kernels at the first evaluation.

  Afterwards their validation and their MESA teacher run on stale weights.
  """
  model = create("micro", dtype=jnp.float64)
  batch = jnp.asarray(images("64x64"))
  before = apply(model, batch)
  fusion = model.stages[0].blocks[0].mixer.fusion
  fusion.kernels[...] = 2 * fusion.kernels[...]
  after = apply(model, batch)
  assert np.abs(after - before).max() > 1e-3
  fusion.alpha[...] = fusion.alpha[...] / 2
  np.testing.assert_allclose(apply(model, batch), before, rtol=1e-12)


def test_more_states_than_one(images):
  """The authors' code cannot run this."""
  logits = []
  for implementation in ("sequential", "associative"):
    model = smj.create_model(
      "spatial_mamba_micro",
      rngs=nnx.Rngs(0),
      dims=(16, 32),
      depths=(1, 1),
      d_state=5,
      implementation=implementation,
    )
    assert model.stages[0].blocks[0].mixer.A_log.shape == (32, 5)
    logits.append(apply(model, images("33x47")))
  assert jnp.isfinite(logits[0]).all()
  np.testing.assert_allclose(*logits, atol=1e-5)


def test_drop_path_keeps_the_mean_and_needs_a_key(images):
  model = smj.create_model(
    "spatial_mamba_micro", rngs=nnx.Rngs(0), drop_path_rate=0.5
  )
  assert np.allclose(
    np.concatenate(model.config.drop_path_rates), np.linspace(0, 0.5, 5)
  )
  batch = images("32x32")
  model.train()
  with pytest.raises(ValueError, match="is random: call model"):
    model(batch)

  @nnx.jit
  def logits(model, key):
    return model(batch, rngs=nnx.Rngs(drop_path=key))

  keys = jax.random.split(jax.random.key(0), 2)
  assert jnp.abs(logits(model, keys[0]) - logits(model, keys[1])).max() > 1e-3
  assert jnp.array_equal(logits(model, keys[0]), logits(model, keys[0]))


def test_drop_path_by_sample():
  scales = drop_path_scales(jax.random.key(0), (0.0, 0.25), 4000)
  assert (scales[0] == 1).all()
  assert set(np.unique(scales[1])) == {0.0, np.float32(1 / 0.75)}
  # Three standard deviations of the mean of 4000 draws: of each branch, and of
  # both at once.
  deviation = (0.25 / 0.75 / 4000) ** 0.5
  np.testing.assert_allclose(scales[1].mean(1), 1, atol=3 * deviation)
  both = np.mean(np.asarray(scales[1] > 0).all(0))
  assert both == pytest.approx(0.75**2, abs=3 * (0.25 / 4000) ** 0.5)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5)), jnp.float32)
  x = x.at[1].set(jnp.inf)
  y = drop_path(x, jnp.asarray([1.0, 0.0, 1.5]))
  expected = jnp.stack((x[0], jnp.zeros((2, 5)), 1.5 * x[2]))
  assert jnp.array_equal(y, expected)


@pytest.mark.usefixtures("x64")
def test_layer_norm_with_its_gradients():
  rng = np.random.default_rng(0)
  ours = LayerNorm(6, dtype=jnp.float64, rngs=nnx.Rngs(0))
  theirs = nnx.LayerNorm(
    6, epsilon=1e-5, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
  )
  for norm in (ours, theirs):
    norm.scale[...] = jnp.linspace(-1, 2, 6)
    norm.bias[...] = jnp.linspace(3, -1, 6)
  # One token is constant, with a variance of 0; one is far from 0.
  x = jnp.asarray(rng.normal(size=(2, 3, 4, 6))).at[0, 1, 2].set(0.7)
  x = x.at[1, 0, 0].add(1e3)
  g = jnp.asarray(rng.normal(size=x.shape))
  results = []
  # Flax's LayerNorm promotes its epsilon.
  for norm, promotion in ((ours, "strict"), (theirs, "standard")):
    graphdef, parameters = nnx.split(norm)

    def call(parameters, x, graphdef=graphdef):
      return nnx.merge(graphdef, parameters)(x)

    with jax.numpy_dtype_promotion(promotion):
      y, pullback = jax.vjp(jax.jit(call), parameters, x)
      results.append((y, nnx.to_pure_dict(pullback(g)[0]), pullback(g)[1]))
  # The statistics of the token at 1e3 have ten digits left.
  for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_layer_norm_in_half_precision():
  """The error is the rounding to bfloat16, also far from 0."""
  half = LayerNorm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert half.scale.dtype == jnp.float32
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 64))
  x = jnp.asarray(x + np.logspace(-1, 2, 24).reshape(2, 3, 4, 1), jnp.bfloat16)
  x = x.at[0, 0, 0].set(0.7)
  inference, training = half(x), jax.vjp(half, x)[0]
  assert inference.dtype == training.dtype == jnp.bfloat16
  exact = np.asarray(x, np.float64)
  exact -= exact.mean(-1, keepdims=True)
  exact /= np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
  for y in (inference, training):
    np.testing.assert_allclose(
      np.asarray(y, np.float64), exact, rtol=2**-8, atol=2**-8
    )


@pytest.mark.soak
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_a_model_without_kernels_on_a_gpu(monkeypatch, implementation):
  gpu = types.SimpleNamespace(compute_capability="9.0")
  monkeypatch.setattr(gpu_device, "get_default_device", lambda: gpu)
  model = smj.create_model(
    "spatial_mamba_micro",
    rngs=nnx.Rngs(0),
    dims=(32, 64),
    depths=(1, 1),
    dtype="bfloat16",
    implementation=implementation,
    layer_implementation=implementation,
  )

  def loss(images):
    return jnp.sum(model(images))

  traced = jax.jit(jax.grad(loss)).trace(jnp.zeros((1, 32, 32, 3)))
  program = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert ("mosaic_gpu" in program) == (implementation is None)


def test_activations_with_their_gradients():
  x = jnp.concatenate([jnp.linspace(-200, 200, 801), jnp.zeros(1)])
  for ours, theirs in (
    (silu, jax.nn.silu),
    (gelu, lambda x: jax.nn.gelu(x, approximate=False)),
    (relu, jax.nn.relu),
  ):
    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(
      jax.vmap(jax.grad(ours))(x), jax.vmap(jax.grad(theirs))(x), atol=2e-6
    )


def test_initialisation_is_the_authors():
  model = smj.create_model("spatial_mamba_tiny", rngs=nnx.Rngs(0))
  block = model.stages[2].blocks[3]
  mixer = block.mixer
  assert np.std(mixer.in_proj.kernel[...]) == pytest.approx(0.02, rel=0.02)
  assert np.abs(mixer.x_proj.kernel[...]).max() <= 512**-0.5
  assert np.std(mixer.x_proj.kernel[...]) == pytest.approx(
    (512 * 3) ** -0.5, rel=0.03
  )
  assert np.abs(mixer.dt_proj.kernel[...]).max() <= 16**-0.5
  dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
  assert 1e-3 * 0.999 <= dt.min() <= dt.max() <= 0.1 * 1.001
  assert np.mean(np.log(dt)) == pytest.approx(np.log(0.01), abs=0.2)
  assert (mixer.A_log[...] == 0).all()
  assert (mixer.D[...] == 1).all()
  assert (mixer.fusion.kernels[...] == 1).all()
  assert (mixer.fusion.alpha[...] == 1).all()
  assert np.std(block.conv1.kernel[...]) == pytest.approx(27**-0.5, rel=0.1)
  assert not np.any(block.mlp.fc1.bias[...])
  conv = model.downsamples[0].expand
  assert np.abs(conv.bias[...]).max() <= 1 / 8
  assert np.std(conv.kernel[...]) == pytest.approx(1 / (8 * 3**0.5), rel=0.03)


def _fresh(depth, key):
  config = {"dims": (8,), "depths": (depth,), "num_classes": 2}
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(key), **config)
  return nnx.state(model)


def test_a_model_created_under_jit_has_the_same_weights():
  key = jax.random.key(3)
  traced, eager = jax.jit(partial(_fresh, 3))(key), _fresh(3, key)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), traced, eager)
  first, second, _ = (x.conv1.kernel for x in eager.stages[0].blocks.values())
  assert np.abs(first - second).max() > 0.1


def test_the_number_of_compiled_draws_is_independent_of_depth():
  def count(depth):
    text = jax.jit(partial(_fresh, depth)).lower(jax.random.key(3)).as_text()
    return text.count("call @threefry"), text.count("call @_uniform")

  assert count(2) == count(5)
  assert min(count(2)) > 9


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"dims": (16, 32)}, "dims and depths must name the same stages"),
    ({"dims": (15, 32, 64, 128)}, "must be even"),
    ({"d_state": 0}, "d_state must be at least 1, got 0"),
    ({"drop_path_rate": 1.0}, "drop_path_rate must be below 1, got 1.0"),
    ({"dtype": "int32"}, "dtype must be one of bfloat16, float16, float32"),
    ({"num_class": 3}, "'num_class' is no field .* did you mean num_classes"),
  ],
)
def test_a_wrong_field_is_named(overrides, message):
  with pytest.raises(ValueError, match=message):
    smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0), **overrides)


def test_a_wrong_call_is_explained():
  with pytest.raises(ValueError, match="no model is named 'vit'"):
    smj.create_model("vit", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="out_indices must be some of"):
    smj.create_backbone(
      "spatial_mamba_micro", out_indices=(4,), rngs=nnx.Rngs(0)
    )
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"must have shape \[B, H, W, 3\]"):
    model(np.zeros((2, 3, 32, 32), np.float32))
  with pytest.raises(ValueError, match="floating point and normalised"):
    model(np.zeros((2, 32, 32, 3), np.uint8))


def gradients(config, *, is_stacked):
  """Returns the result of a stage in training, and its cotangents."""
  (dim,), (depth,) = config.dims, config.depths
  (stage,) = smj.SpatialMamba(config, rngs=nnx.Rngs(0)).stages
  if is_stacked:
    stage.stack()
  stage.train()
  graphdef, weights = nnx.split(stage)
  # Different scales for each block.
  scales = 1 + jnp.arange(depth * 4.0).reshape(-1, 2, 2) / 9

  def run(weights, x):
    return nnx.merge(graphdef, weights)(x, scales)

  x = jax.random.normal(jax.random.key(0), (2, 5, 4, dim))
  y, pullback = jax.vjp(jax.jit(run), weights, x)
  return y, pullback, pullback(jnp.cos(y))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_stacked", [True, False])
def test_a_stage_trains_with_remat_or_without(monkeypatch, is_stacked):
  """With remat blocks run in a loop; without, as on a GPU, one by one."""
  found = {}
  for platform, remat in (
    ("cpu", None),
    ("cpu", False),
    ("gpu", None),
    ("gpu", True),
  ):
    device = types.SimpleNamespace(platform=platform)
    monkeypatch.setattr(stages, "get_default_device", lambda d=device: d)
    config = smj.ModelConfig(
      dims=(4,), depths=(2,), dtype="float64", remat=remat
    )
    y, pullback, cotangents = gradients(config, is_stacked=is_stacked)
    kept = [x for x in jax.tree.leaves(pullback) if x.shape[-4:-1] == (2, 5, 4)]
    is_loop = any(x.ndim == 5 for x in kept)
    size = sum(x.size for x in kept)
    found[platform, remat] = is_loop, size, jax.tree.leaves((y, cotangents))
  _, size_with_remat, expected = found["cpu", None]
  for (platform, remat), (is_loop, size, arrays) in found.items():
    has_remat = remat or (remat is None and platform != "gpu")
    assert is_loop == has_remat
    assert (size == size_with_remat) == has_remat
    assert size >= size_with_remat
    for actual, array in zip(arrays, expected, strict=True):
      np.testing.assert_allclose(actual, array, rtol=1e-11, atol=1e-11)


def test_the_residuals_of_a_block_with_remat():
  """They are its input, four products and the SSM's result."""
  config = smj.ModelConfig(dims=(8,), depths=(3,), remat=True)
  _, pullback, _ = gradients(config, is_stacked=False)
  kept = [x.shape for x in jax.tree.leaves(pullback)]
  channels = [x[4] for x in kept if x[:4] == (3, 2, 5, 4)]
  assert sorted(channels) == [3, 8, 8, 16, 32, 32]
