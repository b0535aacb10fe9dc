"""Runs that start from given weights."""

import dataclasses
import pathlib
import runpy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models import ModelConfig
from spatial_mamba_jax.models.mixers import MIXERS
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.checkpoint_files import CheckpointFiles
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.evaluation import evaluate_checkpoint
from spatial_mamba_jax.training.loop import train
from spatial_mamba_jax.training.weights import (
  load_model,
  load_weights,
  read_weights,
  start_from,
)
from tests.pixel_task import PixelNetwork

FAMILIES = ("spatial_mamba", "vmamba")
HEAD = {"head.weight", "head.bias"}
NORM = {"norm.weight", "norm.bias"}


def config_of(num_classes, family="spatial_mamba"):
  return get_model_config(
    f"{family}_micro", dims=(4, 4), depths=(1, 2), num_classes=num_classes
  )


def of_family(names, family):
  """Returns names of the last norm and the head as its authors have them."""
  return {"classifier." * (family == "vmamba") + name for name in names}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """A directory with a classifier of five classes."""
  return saved("spatial_mamba", tmp_path_factory)


def saved(family, tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "pretrained"
  config = config_of(5, family)
  model = config.family.classifier(config, rngs=nnx.Rngs(7))
  smj.save_pretrained(model, path)
  return path


def model_of(config):
  """A model and random weights for it."""
  model = PureModel(partial(config.family.classifier, config))
  return model, model.init(jax.random.key(0))


def tensors_of(weights, model):
  return smj.convert.to_torch(model.bind(weights))


def assert_equal_but(names, actual, expected):
  differing = {
    name
    for name, x in expected.items()
    if name not in actual or not np.array_equal(actual[name], x)
  }
  assert differing == names


@pytest.mark.parametrize(
  "family",
  ["spatial_mamba", pytest.param("vmamba", marks=pytest.mark.soak)],
)
def test_a_run_starts_from_given_weights(tmp_path_factory, tmp_path, family):
  path = saved(family, tmp_path_factory)
  for num_classes, drawn, words in (
    (5, set(), "including its head"),
    (3, HEAD, "a random head: it has 5 classes"),
  ):
    model, fresh = model_of(config_of(num_classes, family))
    weights, said = start_from(path, model, fresh)
    assert words in said
    found, own = tensors_of(weights, model), tensors_of(fresh, model)
    drawn = of_family(drawn, family)
    assert_equal_but(drawn, found, read_weights(path).state_dict)
    for name in drawn:
      np.testing.assert_array_equal(found[name], own[name])
  # A checkpoint of the run, which has our names.
  run = run_of(weights, tmp_path / "run")
  assert_equal_but(set(), read_weights(run).state_dict, found)
  again, _ = start_from(run, model, fresh)
  jax.tree.map(np.testing.assert_array_equal, again, weights)
  assert type(load_model(run)) is type(model.abstract())
  _, evaluated = load_weights(path, *model_of(config_of(5, family)))
  assert list(evaluated) == ["raw"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_has_no_head(tmp_path, family):
  config = config_of(3, family)
  backbone = config.family.backbone(
    config, out_indices=(0, 1), rngs=nnx.Rngs(7)
  )
  smj.save_pretrained(backbone, tmp_path / "backbone")
  model, fresh = model_of(config)
  weights, said = start_from(tmp_path / "backbone", model, fresh)
  assert "it has no head" in said
  found, own = tensors_of(weights, model), tensors_of(fresh, model)
  expected = read_weights(tmp_path / "backbone").state_dict
  outnorms = {name for name in expected if name.startswith("outnorm")}
  assert len(outnorms) == 4
  assert_equal_but(outnorms, found, expected)
  for name in of_family(HEAD | NORM, family):
    np.testing.assert_array_equal(found[name], own[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_run_of_any_mixer_starts_another(tmp_path, family, mixer):
  config = dataclasses.replace(
    config_of(3, family), dims=(8,), depths=(2,), mixer=MIXERS[mixer]
  )
  model = PureModel(partial(config.family.classifier, config))
  weights = some_weights(model, 3)
  again, _ = start_from(
    run_of(weights, tmp_path / "run"), model, some_weights(model)
  )
  jax.tree.map(np.testing.assert_array_equal, again, weights)


def test_a_checkpoint_without_a_head_keeps_its_norm(tmp_path):
  """Only missing weights are drawn."""
  config = config_of(3)
  model, fresh = model_of(config)
  own = tensors_of(fresh, model)
  expected = smj.convert.to_torch(smj.SpatialMamba(config, rngs=nnx.Rngs(7)))
  expected["norm.weight"] = np.arange(2, 6, dtype=np.float32)
  expected["norm.bias"] = np.arange(1, 5, dtype=np.float32)
  expected["head.bias"] = np.arange(1, 4, dtype=np.float32)
  counts = {x for x in expected if x.endswith("num_batches_tracked")}
  for lacks, words in (
    (HEAD, "a random head: it has no head"),
    (HEAD | NORM | counts, "a random head: it has no head"),
    ({"head.bias"}, "including its head"),
  ):
    tensors = {
      f"model.{name}": x for name, x in expected.items() if name not in lacks
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(
      tensors | {"neck.weight": np.zeros(1, np.float32)}, path
    )
    weights, said = start_from(path, model, fresh)
    assert words in said
    assert "left out 1 tensors (neck.weight)" in said
    found = tensors_of(weights, model)
    drawn = lacks - counts
    assert_equal_but(drawn, found, expected)
    for name in drawn:  # A head's bias starts at 0, and is so if it has none.
      np.testing.assert_array_equal(found[name], own[name])


def test_a_head_without_its_norm_is_refused(pretrained, tmp_path):
  tensors = read_weights(pretrained).state_dict
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(
    {name: x for name, x in tensors.items() if name not in NORM}, path
  )
  model, fresh = model_of(config_of(5))
  with pytest.raises(TrainingError, match=r"2 missing \(norm\."):
    start_from(path, model, fresh)


def pixels_of(dims=(4, 4), depths=(1, 2), network=PixelNetwork):
  """Returns a network with a nested backbone, and some weights of it."""
  model = PureModel(partial(network, ModelConfig(dims=dims, depths=depths)))
  return model, some_weights(model)


def some_weights(model, value=0.5):
  # Constants, because random weights take long to compile.
  return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), model.shapes)


def run_of(weights, directory):
  """Writes a run with one checkpoint of the weights; returns its path."""
  with Checkpoints(directory / "checkpoints") as checkpoints:
    checkpoints.save_weights(3, weights)
    checkpoints.wait()
  return directory


@pytest.fixture(params=["pretrained", "authors", "run"])
def classifier(request, pretrained, tmp_path):
  """The path of a classifier's weights, in each format."""
  if request.param == "pretrained":
    return pretrained
  if request.param == "run":
    model = PureModel(partial(smj.SpatialMamba, config_of(5)))
    return run_of(some_weights(model, 3), tmp_path / "run")
  tensors = {
    f"model.{name}": x
    for name, x in read_weights(pretrained).state_dict.items()
  }
  safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
  return tmp_path / "x.safetensors"


def test_a_nested_backbone_starts_from_a_classifier(classifier):
  model, fresh = pixels_of()
  weights, said = start_from(classifier, model, fresh)
  assert said == (
    f"starting from {classifier}; initialised at random: backbone.norms.0,"
    " classifier"
  )
  network = model.bind(weights)
  expected = read_weights(classifier).state_dict
  found = smj.convert.to_torch(network.backbone)
  assert_equal_but(HEAD | NORM, found, expected)
  for name in ("backbone.norms.0.scale", "classifier.kernel"):
    np.testing.assert_array_equal(weights.params[name], fresh.params[name])
  placed = jax.tree.map(lambda x: x.sharding, (weights, fresh))
  assert placed[0] == placed[1]


class MorePixels(PixelNetwork):
  """A network with another path of its backbone, and other classes."""

  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.encoder = nnx.Dict(trunk=self.backbone)
    del self.backbone
    self.classifier = nnx.Linear(config.dims[0], 7, rngs=rngs)


def test_a_network_starts_from_a_run_of_its_own(tmp_path):
  """A head that fits is taken; another stays random."""
  model, fresh = pixels_of()
  before = some_weights(model, 3)
  run = run_of(before, tmp_path / "run")
  weights, said = start_from(run, model, fresh)
  assert said == f"starting from {run}"
  jax.tree.map(np.testing.assert_array_equal, weights, before)

  model, fresh = pixels_of(network=MorePixels)
  weights, said = start_from(run, model, fresh)
  assert said == (
    f"starting from {run}; initialised at random: classifier; left out 2"
    " tensors (classifier.bias, classifier.kernel)"
  )
  for name, x in {**weights.params, **weights.stats}.items():
    expected = {**before.params, **before.stats}.get(
      name.replace("encoder.trunk.", "backbone.")
    )
    if name.startswith("classifier."):
      expected = fresh.params[name]
    np.testing.assert_array_equal(x, expected, err_msg=name)

  model = PureModel(partial(smj.SpatialMamba, config_of(5)))
  weights, said = start_from(run, model, some_weights(model))
  assert "with a random head: it has no head; left out 2" in said
  backbone = smj.convert.to_torch(load_model(run))
  outnorms = {"outnorm0.weight", "outnorm0.bias"}
  assert_equal_but(outnorms, tensors_of(weights, model), backbone)


class TwoBackbones(PixelNetwork):
  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    self.other = smj.SpatialMambaBackbone(config, out_indices=(0,), rngs=rngs)


class NoBackbone(PixelNetwork):
  def __init__(self, config, *, rngs):
    super().__init__(config, rngs=rngs)
    del self.backbone


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"depths": (1, 3)}, r"27 missing \(layers\.1\.blocks\.2"),
    ({"depths": (1, 1)}, r"27 unexpected \(layers\.1\.blocks\.1"),
    ({"dims": (4, 8)}, r"misshapen \(.* is \[.*\] instead of \["),
    ({"network": TwoBackbones}, "a TwoBackbones has 2"),
    ({"network": NoBackbone}, "a NoBackbone has none"),
  ],
)
def test_what_a_nested_backbone_cannot_take(pretrained, options, words):
  model, fresh = pixels_of(**options)
  with pytest.raises(TrainingError, match=words) as caught:
    start_from(pretrained, model, fresh)
  assert "\n" not in str(caught.value)


def test_a_file_of_a_classifier_evaluates_no_other_network(pretrained):
  model, fresh = pixels_of()
  with pytest.raises(TrainingError, match="a PixelNetwork is evaluated from"):
    load_weights(pretrained, model, fresh)


def test_paths_from_here_and_from_home(pretrained, monkeypatch):
  model, fresh = model_of(config_of(5))
  expected = read_weights(pretrained).state_dict
  monkeypatch.chdir(pretrained.parent)
  monkeypatch.setenv("HOME", str(pretrained.parent))
  for name in (pretrained.name, f"~/{pretrained.name}"):
    path = pathlib.Path(name)
    assert_equal_but(set(), read_weights(path).state_dict, expected)
    assert_equal_but(set(), smj.convert.to_torch(load_model(path)), expected)
    weights, _ = start_from(path, model, fresh)
    assert_equal_but(set(), tensors_of(weights, model), expected)
    step, weights = load_weights(path, model, fresh)
    assert step is None
    (weights,) = weights.values()
    assert_equal_but(set(), tensors_of(weights, model), expected)
  with pytest.raises(UserError, match="of this machine"):
    read_weights(pathlib.Path("gs://bucket/run"))


def test_another_model_is_refused(pretrained, tmp_path):
  config = ModelConfig(dims=(4, 4), depths=(1, 3), num_classes=5)
  model, fresh = model_of(config)
  with pytest.raises(TrainingError, match=r"missing \(layers\.1\.blocks\.2"):
    start_from(pretrained, model, fresh)
  with pytest.raises(TrainingError, match="does not exist"):
    start_from(tmp_path / "none.pth", model, fresh)


@pytest.fixture
def finetune(image_tree, pretrained):
  """The experiment of configs/finetune.py on a small model and tree."""
  config = runpy.run_path("configs/finetune.py")["get_config"]()
  config.validate()
  config.init_from = str(pretrained)
  config.model.dims, config.model.depths = (4, 4), (1, 2)
  config.task.num_classes = 3
  config.model.dtype = "float32"
  config.data.data_dir = str(image_tree)
  config.data.image_size = 24
  config.data.num_workers = 0
  config.optimizer.warmup = "0 epochs"
  # At the real learning rate, four steps round to nothing for some weights.
  config.optimizer.learning_rate *= 100
  config.batch_size = config.evaluation_batch_size = 4
  config.length = "2 epochs"
  return config


def test_fine_tuning_on_a_folder_of_ones_own(finetune, tmp_path, capfd):
  evaluation = train(finetune, tmp_path / "run")
  assert evaluation.values["images"] == 9
  assert "a random head: it has 5 classes" in capfd.readouterr().err
  found = read_weights(tmp_path / "run", raw=True).state_dict
  before = read_weights(pathlib.Path(finetune.init_from)).state_dict
  moved = {
    name: np.abs(found[name] - x).max()
    for name, x in before.items()
    if name not in HEAD and x.dtype == np.float32
  }
  assert min(moved.values()) > 0
  # Layer-wise learning rates move the stem less than the last block.
  weight = "self_attention.in_proj.weight"
  first, last = (
    moved[f"layers.{i}.{weight}"] for i in ("0.blocks.0", "1.blocks.1")
  )
  assert first < 0.8 * last


def test_a_linear_probe_at_another_resolution(finetune, tmp_path):
  finetune.linear_probe = True
  train(finetune, tmp_path / "run")
  before = read_weights(pathlib.Path(finetune.init_from)).state_dict
  for raw in (False, True):
    found = read_weights(tmp_path / "run", raw=raw).state_dict
    assert_equal_but(HEAD, found, before)
  finetune.data.image_size = 40
  step, evaluations = evaluate_checkpoint(finetune, tmp_path / "run")
  assert step in CheckpointFiles(tmp_path / "run" / "checkpoints").steps()
  assert evaluations["raw"].values["images"] == 9
