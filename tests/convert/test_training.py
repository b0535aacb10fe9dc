"""Training and evaluation read weights in every format."""

import dataclasses
import os
import pathlib
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.__main__ import convert
from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.models.mixers import MambaConfig
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import (
  ModelSection,
  OptimizerConfig,
  TrainConfig,
  TrainingError,
)
from spatial_mamba_jax.training.evaluation import evaluate_checkpoint
from spatial_mamba_jax.training.loop import train
from spatial_mamba_jax.training.optimizer import Optimizer
from spatial_mamba_jax.training.state import initial_state
from spatial_mamba_jax.training.weights import load_model


@pytest.fixture
def experiment(small):
  """An experiment on the small model."""
  config = small.config
  return TrainConfig(
    task=ClassificationConfig(num_classes=config.num_classes),
    model=ModelSection(
      dims=config.dims,
      depths=config.depths,
      mixer=dataclasses.replace(config.mixer),  # Copied: a test changes it.
      mlp_ratio=config.mlp_ratio,
    ),
    data=DataConfig(
      name="synthetic", image_size=16, synthetic_images=24, synthetic_classes=3
    ),
    optimizer=OptimizerConfig(warmup="0 epochs"),
    batch_size=8,
    length="1 epoch",
    evaluation_batch_size=8,
  )


@pytest.fixture
def sources(small, write_checkpoint, tmp_path):
  """The small model's weights in every format."""
  path = write_checkpoint(
    tmp_path / "x.pth", {"model": smj.convert.to_torch(small)}
  )
  names = ("x.safetensors", "directory", "run/checkpoints/0")
  for name in names:
    convert(path, tmp_path / name)
  return [path, *(tmp_path / name for name in (*names, "run"))]


def test_evaluation_reads_every_format(experiment, sources, small):
  other = smj.SpatialMamba(small.config, rngs=nnx.Rngs(1))
  path = sources[0].with_name("other")
  smj.save_pretrained(other, path)
  expected, *evaluations = [
    evaluation
    for source in (*sources, path)
    for evaluation in evaluate_checkpoint(experiment, source)[1].values()
  ]
  *same, different = evaluations
  assert expected.values["images"] == 24
  assert all(evaluation == expected for evaluation in same)
  assert different.values["loss"] != expected.values["loss"]


def test_evaluation_names_a_mismatch(experiment, sources, tmp_path):
  experiment.model.mixer.d_state = 3
  for path in sources:
    with pytest.raises(
      TrainingError, match=r"a model other than config.model: .*A_log"
    ) as error:
      evaluate_checkpoint(experiment, path)
    assert "\n" not in str(error.value)
  (tmp_path / "none.pth").write_bytes(b"nothing")
  for name in ("none", "missing.pth", "none.pth", "missing.safetensors"):
    with pytest.raises(TrainingError, match=name):
      evaluate_checkpoint(experiment, tmp_path / name)


def test_converted_weights_cannot_be_resumed(experiment, sources):
  with pytest.raises(TrainingError, match=r"only weights.*another workdir"):
    train(experiment, sources[-1])


def test_a_run_gives_its_average_or_raw_weights(small, tmp_path):
  pure = PureModel(partial(smj.SpatialMamba, small.config))
  weights = pure.weights_of(small)
  optimizer = Optimizer(optax.adam(1.0).init, lambda *_: ())
  state = initial_state(weights, optimizer, ("correct",))
  state = state.replace(ema=jax.tree.map(lambda x: 2 * x, weights))
  with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
    checkpoints.save(state, {})
  expected = smj.convert.to_torch(small)
  for raw, factor in ((False, 2), (True, 1)):
    convert(tmp_path / "run", tmp_path / str(raw), raw=raw)
    found = smj.convert.to_torch(smj.from_pretrained(tmp_path / str(raw)))
    for name, x in expected.items():
      np.testing.assert_array_equal(found[name], factor * x)


def test_a_run_is_found_by_relative_and_home_paths(
  sources, small, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  expected = smj.convert.to_torch(small)
  for path in ("run", "run/checkpoints/0", "~/run/checkpoints"):
    found = smj.convert.to_torch(load_model(pathlib.Path(path)))
    for name, x in expected.items():
      np.testing.assert_array_equal(found[name], x)


def test_a_file_without_an_average_refuses_raw(sources, tmp_path):
  with pytest.raises(TrainingError, match="has no raw weights"):
    convert(sources[-1], tmp_path / "out", raw=True)


def test_a_run_of_any_mixer_becomes_a_directory(experiment, tmp_path):
  """With the mixer, the class names and the preprocessing of the run."""
  experiment.model.mixer = MambaConfig(d_state=2, expand=1)
  experiment.data.test_crop_ratio = 0.8
  train(experiment, tmp_path / "run")
  model = load_model(tmp_path / "run")
  config = model.config
  assert config.mixer == experiment.model.mixer
  assert config.preprocessing == smj.Preprocessing(image_size=16, short_side=20)
  assert config.class_names == ("0", "1", "2")
  report = convert(tmp_path / "run", tmp_path / "x", license="mit")
  assert "d_state 2" in report
  back = smj.from_pretrained(tmp_path / "x")
  assert back.config == config
  images = np.random.default_rng(0).standard_normal((1, 16, 16, 3))
  images = images.astype(np.float32)
  np.testing.assert_array_equal(back(images), model(images))
  # The program of a run stacks blocks, so that its sums have another order.
  ((_, evaluations), (_, again)) = (
    evaluate_checkpoint(experiment, tmp_path / name) for name in ("run", "x")
  )
  assert again["raw"] == evaluations["ema"]
  card = (tmp_path / "x" / "README.md").read_text()
  assert 'license: "mit"\n' in card
  assert "| token mixer | mamba |" in card
  assert f"| top1 | {evaluations['ema'].values['top1']:.6g} |" in card
  assert '"weight_decay": 0.05' in card
  assert "shorter side is resized to 20 pixels" in card
  modes = {
    path.name: path.stat().st_mode & 0o777
    for path in (tmp_path / "x").iterdir()
  }
  umask = os.umask(0)
  os.umask(umask)
  assert set(modes.values()) == {0o666 & ~umask}, modes
