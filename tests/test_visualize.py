"""Pictures show what they say, and mistakes end in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import spatial_mamba_jax as smj
from spatial_mamba_jax import theory, visualize
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.backbone import Trunk
from spatial_mamba_jax.models.mixers import MIXERS, V2MConfig
from spatial_mamba_jax.models.states import mixer_input
from spatial_mamba_jax.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from spatial_mamba_jax.visualize import command, figures, images

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
  flat = [d * model.config.mixer.d_state + n for d, n in maps.places]
  assert set(flat) == set(np.argsort(spread)[-2:])
  for k, states in enumerate((before, after)):
    np.testing.assert_allclose(maps.mean[k], np.abs(states).mean(-1), rtol=1e-5)
    for i, index in enumerate(flat):
      np.testing.assert_allclose(
        maps.single[k, i], states[..., index], rtol=1e-4, atol=1e-6
      )


def test_a_single_token_has_no_map(model, image):
  with pytest.raises(ValueError, match=r"stage 3 has one token .* 32 x 32"):
    visualize.mixing_maps(model, image, [(0.0, 0.0)], stage=3, block=0)


def arrays_of(axes):
  """What an image shows; NaN where it shows nothing."""
  (shown,) = axes.images
  return np.ma.filled(np.ma.asarray(shown.get_array(), float), np.nan)


def test_a_figure_of_receptive_fields():
  rng = np.random.default_rng(0)
  fields = {"one": rng.random((4, 6)), "two": rng.random((4, 6))}
  # Half of the sum, 1 + 1 of 4, is in two of the pixels.
  fields["one"] = np.full((4, 6), 2 / 22)
  fields["one"][1, 2:4] = 1.0
  figure = figures.draw_receptive_fields(fields, "a title")
  assert figure.get_suptitle() == "a title"
  for axes, (name, field) in zip(figure.axes, fields.items(), strict=False):
    np.testing.assert_array_equal(arrays_of(axes), field)
    assert axes.get_title().startswith(f"{name}\n")
  assert (
    figure.axes[0].get_title().endswith("half of the sum in 8% of the pixels")
  )


def test_a_figure_of_states():
  rng = np.random.default_rng(0)
  maps = visualize.StateMaps(
    rng.random((2, 4, 6)), rng.random((2, 1, 4, 6)), ((7, 1),)
  )
  pixels = rng.integers(0, 256, (8, 12, 3), np.uint8)
  axes = figures.draw_states(pixels, maps, "a title").axes
  np.testing.assert_array_equal(arrays_of(axes[0]), pixels)
  labels = {x.get_ylabel(): x for x in axes if x.get_ylabel()}
  for i, when in enumerate(("before", "after")):
    np.testing.assert_array_equal(
      arrays_of(labels[f"{when} fusion"]), maps.mean[i]
    )
  (single,) = (x for x in axes if x.get_title() == "channel 7, state 1")
  np.testing.assert_array_equal(arrays_of(single), maps.single[0, 0])


def test_a_figure_of_mixing():
  weights = np.random.default_rng(0).random((2, 4, 6)) + 0.1
  tokens = [(1, 2), (3, 5)]
  pixels = np.zeros((8, 12, 3), np.uint8)
  axes = figures.draw_mixing(pixels, tokens, weights, "a title").axes
  for shown, (row, column), expected in zip(
    axes[1:3], tokens, weights, strict=True
  ):
    values = arrays_of(shown)
    assert np.argwhere(np.isnan(values)).tolist() == [[row, column]]
    others = ~np.isnan(values)
    np.testing.assert_array_equal(values[others], expected[others])
    assert shown.lines[0].get_xydata().tolist() == [[column, row]]
  assert [line.get_xydata()[0].tolist() for line in axes[0].lines[::2]] == [
    [2, 1],
    [5, 3],
  ]


def test_images_are_normalised_as_the_recipe_does():
  pixels = np.full((1, 1, 3), 255, np.uint8)
  expected = (1 - np.array(IMAGENET_MEAN)) / IMAGENET_STD
  np.testing.assert_allclose(images.normalise(pixels, 3)[0, 0], expected, 1e-6)
  np.testing.assert_allclose(
    images.normalise(pixels, 1)[0, 0], expected.mean(), 1e-6
  )
  with pytest.raises(UserError, match="takes 4 channels"):
    images.normalise(pixels, 4)


@pytest.fixture
def photograph(tmp_path):
  path = tmp_path / "photograph.jpg"
  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return path


@pytest.fixture
def quick(monkeypatch, model):
  """Spares the command the creation of random weights; notes which."""
  created = []

  def create(name, *, rngs, **overrides):
    created.append((name, rngs.params(), overrides))
    return model

  monkeypatch.setattr(command, "create_model", create)
  return created


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
def test_command_draws(capsys, tmp_path, photograph, monkeypatch, kind, suffix):
  few = {name: MIXERS[name] for name in ("spatial_mamba", "v2m")}
  monkeypatch.setattr(command, "MIXERS", few)
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
def test_command_draws_trained_weights(capsys, tmp_path, model, monkeypatch):
  drawn = {}
  draw = figures.draw_receptive_fields

  def spy(fields, title):
    drawn.update(fields)
    return draw(fields, title)

  monkeypatch.setattr(figures, "draw_receptive_fields", spy)
  smj.save_pretrained(model, tmp_path / "weights")
  out = tmp_path / "erf.png"
  # The image is one of scikit-learn's photographs.
  status, _, err = run(
    capsys,
    *("erf", "--weights", tmp_path / "weights", f"--image_size={SIZE}"),
    *("--out", out, "--seed=1"),
  )
  assert (status, err) == (0, "")
  # Random and trained weights side by side.
  assert list(drawn) == ["random weights", "trained"]
  assert not np.allclose(*drawn.values())


def test_command_creates_what_is_asked_for(quick, capsys, tmp_path, photograph):
  for seed in (1, 2):
    run(
      capsys,
      *("states", "--model=spatial_mamba_small", f"--seed={seed}"),
      *("--image", photograph, "--image_size=32", "--out", tmp_path / "x.png"),
    )
  (name, one, _), (_, two, _) = quick
  assert name == "spatial_mamba_small"
  assert (one == nnx.Rngs(1).params()).all()
  assert (two == nnx.Rngs(2).params()).all()


def test_a_mixer_without_a_matrix(image):
  model = smj.create_model(
    "spatial_mamba_micro", mixer=V2MConfig(), rngs=nnx.Rngs(0)
  )
  with pytest.raises(ValueError, match="a V2M has no mixing matrix"):
    visualize.mixing_maps(model, image, [(0.5, 0.5)], stage=0, block=0)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("states", "--stage=9"), "there is no block 0 in a stage 9"),
    (("mixing", "--block=9"), "there is no block 9 in a stage 0"),
    (("erf", "--image", "{here}/missing.jpg"), "missing.jpg: No such file"),
    (("erf", "--image", "{here}/text.jpg"), "text.jpg is no image that can be"),
    (("erf", "--image", "{here}"), "Is a directory"),
    (("erf", "--out=picture.gif"), "--out=picture.gif must end in .png or"),
    (("erf", "--out={here}/no/x.png"), "no/x.png cannot be written: give"),
    (("mixing", "--stage=3", "--image_size=32"), "stage 3 has one token"),
    (("erf", "--weights=x", "--model=spatial_mamba_tiny"), "not allowed with"),
    (("states", "--image", "a.jpg", "b.jpg"), "unrecognized arguments: b.jpg"),
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
  )
  assert status == 2
  assert not said
  *before, last = err.splitlines()
  assert message in last
  # Before it, argparse prints how the command is used.
  assert not before or before[0].startswith("usage: ")
