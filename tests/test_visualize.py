"""Pictures show what they say, and mistakes end in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import spatial_mamba_jax as smj
from spatial_mamba_jax import theory, visualize
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.mixers import StructureAwareConfig
from spatial_mamba_jax.models.states import mixer_input
from spatial_mamba_jax.visualize import command

SIZE = 32


@pytest.fixture(scope="module")
def model():
  return smj.create_model("spatial_mamba_micro", d_state=2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def image():
  return jax.random.normal(jax.random.key(0), (SIZE, SIZE, 3))


class Stencil(Trunk):
  """Features whose receptive field is known: two neighbours of each pixel."""

  def __init__(self):
    self.deterministic = True

  def _stage_features(self, images, rngs):
    left = jnp.roll(images, 1, axis=2)
    below = jnp.roll(images, -1, axis=1)
    last = jnp.concatenate((1 + left * 0.5, -1 + below, 1 - below), axis=-1)
    return [images, last]


def test_receptive_field_is_the_gradient_of_positive_features():
  # Small, so that the ReLU keeps the first and the last features alone.
  images = 0.1 * jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
  expected = np.zeros((4, 6))
  expected[2, 2], expected[3, 3] = 0.5, 1.0
  field = visualize.receptive_field(Stencil(), images)
  np.testing.assert_allclose(field, expected)


def test_mixing_maps_are_rows_of_the_matrix(model, image):
  place = {"stage": 2, "block": 1}
  tokens, maps = visualize.mixing_maps(
    model, image, [(0.5, 0.25), (1.0, 1.0)], **place
  )
  mixer, x = mixer_input(model, image[None], **place)
  u, (delta, A, B, C) = mixer.select(x)
  _, height, width, _ = u.shape

  def flat(x):
    return x.reshape(1, height * width, -1)

  M = theory.mixing_matrix(
    jax.nn.softplus(flat(delta) + mixer.dt_bias[...]),
    *(A, flat(B), flat(C)),
    D=mixer.D[...],
    fusion=theory.fusion_matrix(
      mixer.fusion.kernels[...],
      mixer.fusion.alpha[...],
      height=height,
      width=width,
    ),
  )
  assert tokens == [(height // 2, width // 4), (height - 1, width - 1)]
  assert maps.shape == (2, height, width)
  for (row, column), weights in zip(tokens, maps, strict=True):
    expected = jnp.abs(M[0, :, row * width + column]).mean(axis=0)
    # Sums of at most 27 terms in float32.
    np.testing.assert_allclose(
      weights.ravel(), expected, rtol=1e-4, atol=1e-6 * expected.max()
    )


def test_state_maps_are_of_the_channels_that_vary_most(model, image):
  maps = visualize.state_maps(model, image, stage=1, block=0, count=2)
  states = smj.block_states(model, image[None], 1, 0)
  before, after = (np.asarray(x[0]).reshape(4, 4, -1) for x in states)
  spread = before.std(axis=1).mean(axis=0)
  assert set(maps.indices) == set(np.argsort(spread)[-2:])
  for k, states in enumerate((before, after)):
    np.testing.assert_allclose(maps.mean[k], np.abs(states).mean(-1), rtol=1e-5)
    for i, channel in enumerate(maps.indices):
      np.testing.assert_allclose(
        maps.channels[k, i], states[..., channel], rtol=1e-4, atol=1e-6
      )


@pytest.fixture
def photograph(tmp_path):
  path = tmp_path / "photograph.jpg"
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


@pytest.fixture
def quick(monkeypatch, model):
  """Spares the command the creation of random weights."""
  monkeypatch.setattr(command, "create_model", lambda *_, **__: model)


def run(capsys, *arguments):
  """Runs the command; returns its status and what it printed."""
  try:
    status = command.main([str(x) for x in arguments])
  except SystemExit as error:
    status = error.code
  out, err = capsys.readouterr()
  return status, out, err


@pytest.mark.parametrize(
  ("kind", "suffix"),
  [("erf", "png"), ("states", "svg"), ("mixing", "png"), ("mixers", "svg")],
)
@pytest.mark.usefixtures("quick")
def test_command_draws(capsys, tmp_path, photograph, kind, suffix):
  out = tmp_path / f"picture.{suffix}"
  status, said, err = run(
    capsys,
    *(kind, "--model=spatial_mamba_micro", f"--image_size={SIZE}"),
    *("--image", photograph, "--out", out),
  )
  assert (status, err) == (0, "")
  assert said == f"wrote {out}\n"
  if suffix == "png":
    with Image.open(out) as picture:
      assert np.asarray(picture.convert("L")).std() > 10
  else:
    text = out.read_text()
    assert "<svg" in text
    assert "<image" in text


@pytest.mark.usefixtures("quick")
def test_command_draws_trained_weights(capsys, tmp_path, model):
  smj.save_pretrained(model, tmp_path / "weights")
  out = tmp_path / "erf.png"
  # The image is one of scikit-learn's photographs.
  status, _, err = run(
    capsys,
    *("erf", "--weights", tmp_path / "weights", f"--image_size={SIZE}"),
    *("--out", out),
  )
  assert (status, err) == (0, "")
  # Random and trained weights side by side.
  with Image.open(out) as picture:
    assert picture.width > 1.5 * picture.height


def test_every_mixer_of_the_package_joins_the_sheet():
  assert command.mixer_kinds() == [StructureAwareConfig]

  class Another(StructureAwareConfig):
    name = "another"
    __module__ = f"{StructureAwareConfig.__module__}_too"

  kinds = command.mixer_kinds()
  assert [kind.name for kind in kinds] == ["another", "structure_aware"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("states", "--stage=9"), "there is no block 0 in a stage 9"),
    (("mixing", "--block=9"), "there is no block 9 in a stage 0"),
    (("erf", "--image", "{here}/missing.jpg"), "missing.jpg: No such file"),
    (("erf", "--image", "{here}/text.jpg"), "text.jpg is no image that can be"),
    (("erf", "--image", "{here}"), "Is a directory"),
    (("erf", "--out=picture.gif"), "--out=picture.gif must end in .png or"),
    (("erf", "--out={here}/no/x.png"), "its directory must exist"),
    (("states", "--weights={here}/text.jpg"), "text.jpg"),
    (("erf", "--image_size=0"), "must be a number from 1 to"),
    (("erf", "--image_size=big"), "must be a number from 1 to"),
  ],
)
@pytest.mark.usefixtures("quick")
def test_a_mistake_is_one_line(capsys, tmp_path, arguments, message):
  (tmp_path / "text.jpg").write_text("no image")
  status, said, err = run(
    capsys,
    *(x.format(here=tmp_path) for x in arguments),
    *(() if "weights" in arguments[1] else ("--model=spatial_mamba_micro",)),
  )
  assert status == 2
  assert not said
  assert message in err.splitlines()[-1]
  assert "Traceback" not in err
