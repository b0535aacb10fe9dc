"""Every mixer computes what its authors' code computes, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spatial_mamba_jax.convert import from_torch, to_torch
from spatial_mamba_jax.convert.families import table_of
from spatial_mamba_jax.convert.names import torch_tensors
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models import layers
from spatial_mamba_jax.models.mixers import (
  MIXERS,
  EVSSConfig,
  LinearAttentionConfig,
  MambaConfig,
  MHSConfig,
  PlainMambaConfig,
  SS2DConfig,
  V2MConfig,
  VimConfig,
)
from spatial_mamba_jax.models.mixers.base import LinearMixer, Place
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.theory import mixing_rows

# What is not turned, for the mixer that turns images from block to block.
LAST = Place(0, 3, 3)
GOLDEN = {
  "mamba": MambaConfig(),
  "vim": VimConfig(),
  "vmamba_ss2d_v05_noz": SS2DConfig(),
  "vmamba_ss2d_v0": SS2DConfig(d_state=8, expand=2, gate=True, conv_bias=True),
  "mlla_mixer": LinearAttentionConfig(head_dim=8),
  "plainmamba": PlainMambaConfig(),
  "v2m": V2MConfig(),
  "mhsvm_h4": MHSConfig(d_state=8, threshold=0.5),
  "evssm": EVSSConfig(d_state=8),
}
pytestmark = pytest.mark.usefixtures("x64")


def create(mixer, dim, place=LAST, dtype="float64"):
  config = get_model_config("spatial_mamba_micro", dtype=dtype)
  variant = mixer.variant(place)
  return mixer.create(dim, variant, config=config, rngs=nnx.Rngs(0))


def assert_close(actual, expected, name):
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape, name
  scale = np.abs(expected).max()
  assert np.abs(actual - expected).max() <= 1e-9 * scale, name


def part(arrays, prefix):
  return {
    name.removeprefix(prefix): array.astype(np.float64)
    for name, array in arrays.items()
    if name.startswith(prefix)
  }


def assert_gradients(module, function, arrays, rename=lambda name: name):
  """Holds a function of a module and x, and its gradients, to golden ones."""
  graphdef, params = nnx.split(module)
  x, g = (jnp.asarray(arrays[name], jnp.float64) for name in ("x", "g"))

  @jax.jit
  def run(params, x):
    y, pullback = jax.vjp(
      lambda params, x: function(nnx.merge(graphdef, params), x), params, x
    )
    return y, pullback(g)

  y, (dparams, dx) = run(params, x)
  assert_close(y, arrays["y"], "y")
  assert_close(dx, arrays["gx"], "x")
  gradients = {
    ".".join(map(str, path)): variable[...]
    for path, variable in nnx.to_flat_state(dparams)
  }
  tensors = torch_tensors(gradients, table_of(module))
  expected = part(arrays, "g/")
  assert {rename(name) for name in tensors} == expected.keys()
  for name, tensor in tensors.items():
    assert_close(tensor, expected[rename(name)], name)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_mixer_is_its_authors(golden, name):
  arrays = golden(f"mixers/{name}")
  mixer = create(GOLDEN[name], arrays["x"].shape[-1])
  weights = part(arrays, "w/")
  # What the authors' state dicts have beside these.
  copies = (
    {"mhs.x_ssproj.weight": weights["mhs.x_ssproj_W"]}
    if name == "mhsvm_h4"
    else {}
  )
  rotations = {"attn.rope.rotations": np.zeros(1)} if "mlla" in name else {}
  from_torch(mixer, {**weights, **copies, **rotations})
  assert to_torch(mixer).keys() == {*weights, *copies}
  assert_gradients(mixer, lambda mixer, x: mixer(x), arrays)
  if "x2" in arrays:  # Another size with the same weights.
    y = mixer(jnp.asarray(arrays["x2"], jnp.float64))
    assert_close(y, arrays["y2"], "y2")


def test_a_half_block_of_evssm(golden):
  """Its first block transposes the image, and leaves it transposed."""
  arrays = golden("mixers/evssm_half_block_idx0")
  mixer = create(EVSSConfig(d_state=8), 24, Place(0, 0, 0))
  weights = part(arrays, "w/")
  scale, bias = (weights[f"norm1.body.{x}"] for x in ("weight", "bias"))
  from_torch(mixer, part(weights, "attn."))

  def half_block(mixer, x):
    rms = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    normalised = x / rms * scale[None, None, None] + bias[None, None, None]
    return jnp.swapaxes(x + mixer(normalised), 1, 2)

  own = {
    name.replace("g/attn.", "g/"): array
    for name, array in arrays.items()
    if not name.startswith("g/norm1")
  }
  assert_gradients(mixer, half_block, own)


def test_a_block_of_mlla(golden):
  """Spatial-Mamba's block with this mixer."""
  arrays = golden("mixers/mlla_block")
  config = get_model_config(
    "spatial_mamba_micro",
    dtype="float64",
    mixer=LinearAttentionConfig(head_dim=8),
  )
  block = config.family.block(16, None, config=config, rngs=nnx.Rngs(0))
  weights = part(arrays, "w/")
  others = ("cpe", "norm", "mlp")
  for name, tensor in weights.items():
    if not name.startswith(others):
      continue
    module, kind = name.replace("cpe", "conv").rsplit(".", 1)
    layer = block
    for attribute in module.split("."):
      layer = getattr(layer, attribute)
    if kind == "bias":
      layer.bias[...] = tensor
    elif module.startswith("norm"):
      layer.scale[...] = tensor
    else:
      is_conv = tensor.ndim == 4
      layer.kernel[...] = (
        tensor[:, 0].transpose(1, 2, 0) if is_conv else tensor.T
      )
  mixer = {k: v for k, v in weights.items() if not k.startswith(others)}
  from_torch(block.mixer, mixer)
  x = jnp.asarray(arrays["x"], jnp.float64)
  y, pullback = jax.vjp(block, x)
  assert_close(y, arrays["y"], "y")
  assert_close(pullback(arrays["g"].astype(np.float64))[0], arrays["gx"], "gx")


def test_v2m_with_every_output_at_its_own_pixel():
  """The mean of two of four planes, as the authors' reshapes would have it."""
  mixer = create(V2MConfig(aligned=True, d_state=2), 8)
  x = jax.random.normal(jax.random.key(0), (1, 3, 5, 8), jnp.float64)
  v, z = jnp.split(mixer.in_proj(x), 2, axis=-1)

  def rows(branch, image):
    return jnp.concatenate([branch(row[None])[None] for row in image[0]], 1)

  def plane(v, z):
    gate = jax.nn.silu(z)
    y = rows(mixer.first, v) * gate
    return rows(mixer.second, jnp.swapaxes(y, 1, 2)).swapaxes(1, 2) * gate

  total = 0
  for transposed in (False, True):
    for mirrored in (False, True):

      def turn(image, transposed=transposed, mirrored=mirrored):
        image = jnp.swapaxes(image, 1, 2) if transposed else image
        return image[:, :, ::-1] if mirrored else image

      y = plane(turn(v), turn(z))
      y = y[:, :, ::-1] if mirrored else y
      total += jnp.swapaxes(y, 1, 2) if transposed else y
  assert_close(mixer(x), mixer.out_proj(total / 2), "aligned")


def test_the_names_of_spatial_mambas_mixer(named_weights):
  mixer = create(MIXERS["spatial_mamba"], 16)
  prefix = "layers.0.blocks.0.self_attention."
  shapes = named_weights.state_dict_shapes("micro")
  own = {k.removeprefix(prefix) for k in shapes if k.startswith(prefix)}
  assert to_torch(mixer).keys() == own
  with pytest.raises(ValueError, match="a Linear is no network, and no mixer"):
    to_torch(mixer.in_proj)


def test_heads_of_linear_attention():
  """Of 32 channels, or of the greatest common divisor."""
  heads = {
    dim: create(LinearAttentionConfig(), dim).heads for dim in (64, 48, 24, 4)
  }
  assert heads == {64: 2, 48: 3, 24: 3, 4: 1}


def test_the_halves_of_a_projection_on_a_gpu(monkeypatch):
  """There they are two products, each with its half of the bias."""
  kwargs = {"dtype": jnp.float64, "rngs": nnx.Rngs(0)}
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6), jnp.float64)
  for use_bias in (True, False):
    layer = layers.uniform_linear(6, 8, use_bias=use_bias, **kwargs)
    expected = layers.halves(layer, x)
    with monkeypatch.context() as patch:
      patch.setattr(layers.smk, "traced_for", lambda: "cuda")
      actual = layers.halves(layer, x)
    for half, other in zip(actual, expected, strict=True):
      assert_close(half, other, "half")


def test_the_routes_of_mhs_vm(golden):
  from spatial_mamba_jax.models.mixers.mhs import PATHS

  routes = golden("mixers/mhsvm_h4")["routes"][:, 0]
  paths = [path for pair in PATHS for path in pair]
  for path, route in zip(paths, routes, strict=True):
    np.testing.assert_array_equal(path.steps(8, 6), route)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_in_half_precision_on_an_image_that_is_not_square(name):
  """Also the scale of a branch, and the matrix of those that have one."""
  config = MIXERS[name]
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 16), jnp.float32)
  if name == "v2m":
    with pytest.raises(UserError, match=r"got 3 x 4: mixer.aligned=True takes"):
      create(config, 16, dtype="float32")(x)
    config = dataclasses.replace(config, aligned=True)
  mixer = create(config, 16, dtype="float32")

  @nnx.jit
  def run(mixer, x, scale):
    return mixer(x, scale)

  one, other = jnp.float32([1, 1]), jnp.float32([0, 2])
  y, scaled = run(mixer, x, one), run(mixer, x, other)
  np.testing.assert_allclose(scaled[0], jnp.zeros_like(y[0]))
  np.testing.assert_allclose(scaled[1], 2 * y[1], rtol=1e-4, atol=1e-5)
  half = run(create(config, 16, dtype="bfloat16"), x.astype(jnp.bfloat16), one)
  assert half.dtype == jnp.bfloat16
  scale = np.abs(y).max()
  assert scale > 0
  assert np.abs(np.asarray(half, np.float32) - y).max() <= 0.05 * scale
  if isinstance(mixer, LinearMixer):

    @nnx.jit
    def rows_of(mixer, x):
      return mixing_rows(mixer.mix, *mixer.select(x), [0, 7])

    rows = rows_of(mixer, x)
    assert all(np.abs(row).max() > 0 for row in rows)
    half = create(config, 16, dtype="bfloat16")
    assert jax.eval_shape(rows_of, half, x.astype(jnp.bfloat16)).shape == (
      rows.shape
    )
