"""VMamba computes what its authors' models compute."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.architecture import abstract_model
from spatial_mamba_jax.convert.names import variables
from spatial_mamba_jax.models.presets import get_model_config

SHAPES = pathlib.Path(__file__).parents[1] / "golden" / "mixers"


def shapes_of(size):
  """The authors' {tensor name: shape}."""
  return json.loads((SHAPES / f"vmamba_state_dict_{size}.json").read_text())


def named_weight(named_weights, name, shape):
  weight = named_weights.named_weight(name, shape)
  if name.endswith(("x_proj_weight", "dt_projs_weight")):
    # Scaled by the fan-in of one scan; the first axis is of all scans.
    return (weight * np.sqrt(shape[1], dtype=np.float64)).astype(np.float32)
  return weight


@pytest.mark.parametrize(
  ("size", "parameters"),
  [("tiny", 30_249_064), ("small", 49_012_840), ("base", 86_614_504)],
)
def test_names_and_shapes_are_the_authors(size, parameters):
  model = abstract_model(get_model_config(f"vmamba_{size}"))
  for _, variable in variables(model):
    variable.set_value(np.broadcast_to(np.float32(0), variable.shape))
  shapes = {k: list(x.shape) for k, x in smj.convert.to_torch(model).items()}
  assert shapes == shapes_of(size)
  assert sum(variable.size for _, variable in variables(model)) == parameters


@pytest.mark.parametrize(
  ("size", "dtype", "image", "tolerance"),
  [
    # PyTorch's softplus is linear above 20, which is 2e-9 less.
    ("micro", "float64", (50, 70), 1e-8),
    ("micro", "float32", (64, 64), 1e-4),
    ("tiny", "float32", (96, 160), 1e-4),
    pytest.param("tiny", "float64", (96, 160), 1e-6, marks=pytest.mark.soak),
    pytest.param("tiny", "float64", (224, 224), 1e-6, marks=pytest.mark.soak),
  ],
)
def test_logits_are_the_authors(
  golden, named_weights, x64, size, dtype, image, tolerance
):
  height, width = image
  model = abstract_model(get_model_config(f"vmamba_{size}", dtype=dtype))
  state_dict = {
    name: named_weight(named_weights, name, shape)
    for name, shape in shapes_of(size).items()
  }
  assert smj.convert.from_torch(model, state_dict) == ((), ())
  images = named_weights.named_images(2, height, width)
  logits = nnx.jit(lambda model, x: model(x))(
    model, jnp.asarray(images.transpose(0, 2, 3, 1), dtype)
  )
  expected = golden(f"mixers/vmamba_{size}")[f"logits_{height}x{width}"]
  scale = np.abs(expected).max()
  assert np.abs(np.asarray(logits) - expected).max() <= tolerance * scale
  back = smj.convert.to_torch(model)
  assert back.keys() == state_dict.keys()
  for name, tensor in state_dict.items():
    np.testing.assert_array_equal(back[name].astype(np.float32), tensor, name)


def test_a_backbone_has_the_features_of_its_stages():

  def features_of(images):
    backbone = smj.create_backbone(
      "vmamba_micro", out_indices=(1, 3), rngs=nnx.Rngs(0)
    )
    return backbone(images)

  features = jax.eval_shape(features_of, jnp.zeros((1, 33, 64, 3)))
  assert [x.shape for x in features] == [(1, 5, 8, 48), (1, 2, 2, 192)]
