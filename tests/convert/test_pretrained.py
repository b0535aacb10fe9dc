"""Models as directories: config.json, replaced heads, overrides."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.architecture import abstract_model, infer_model
from spatial_mamba_jax.convert.families import names_of
from spatial_mamba_jax.convert.names import variables
from spatial_mamba_jax.convert.tables import MIXERS as MIXER_TABLES
from spatial_mamba_jax.models.mixers import MIXERS
from spatial_mamba_jax.models.presets import get_model_config


def assert_same_weights(model, expected):
  tensors, expected = map(smj.convert.to_torch, (model, expected))
  assert list(tensors) == list(expected)
  for name, x in expected.items():
    np.testing.assert_array_equal(tensors[name], x, strict=True)


def filled(config):
  """A classifier with random arrays, made without compiling its creation."""
  model = abstract_model(config)
  rng = np.random.default_rng(0)
  for _, variable in variables(model):
    values = rng.standard_normal(variable.shape)
    variable.set_value(jnp.asarray(values, variable.dtype))
  return model


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
  """A directory of the small model, which no test changes."""
  path = tmp_path_factory.mktemp("saved") / "x"
  smj.save_pretrained(small, path)
  return path


@pytest.fixture
def load(saved, tmp_path):
  """Loads the small model with another config.json."""
  (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")

  def load(content):
    (tmp_path / "config.json").write_bytes(content)
    return smj.from_pretrained(tmp_path)

  return load


def test_a_directory_and_back(each_small, tmp_path):
  (tmp_path / "empty").mkdir()
  for path in (tmp_path / "new", tmp_path / "empty"):
    smj.save_pretrained(each_small, path)
    names = sorted(x.name for x in path.iterdir())
    assert names == [
      *("README.md", "config.json", "model.safetensors"),
      "preprocessor_config.json",
    ]
  model = smj.from_pretrained(str(tmp_path / "new"))
  assert type(model) is type(each_small)
  assert model.config == each_small.config
  assert_same_weights(model, each_small)
  with safetensors.safe_open(
    tmp_path / "new" / "model.safetensors", "numpy"
  ) as file:
    assert file.metadata() == {"format": "pt"}
  card = (tmp_path / "new" / "README.md").read_text()
  front = card.split("---\n")[1]
  assert card.startswith("---\n")
  assert "pipeline_tag: image-classification\n" in front
  assert "library_name: spatial-mamba-jax\n" in front
  title = type(each_small).__name__.replace("lM", "l-M")
  assert f"- {title.lower()}\n" in front
  assert f"# {title} classifier\n" in card
  assert f"A [{title}](https://arxiv.org/abs/24" in card
  with pytest.raises(FileExistsError, match="is not overwritten"):
    smj.save_pretrained(each_small, tmp_path / "new")


def test_overrides_that_keep_the_weights(small, tmp_path):
  smj.save_pretrained(small, tmp_path / "x")
  model = smj.from_pretrained(
    tmp_path / "x",
    dtype="bfloat16",
    drop_path_rate=0.5,
    implementation="sequential",
  )
  assert model.config.dtype == jnp.bfloat16
  assert model.config.mixer.implementation == "sequential"
  assert model.config.drop_path_rates[1] == (0.25, 0.5)
  assert_same_weights(model, small)
  with pytest.raises(ValueError, match="'num_classes' cannot be overridden"):
    smj.from_pretrained(tmp_path / "x", num_classes=5)
  for name, value in (
    ("dtype", None),
    ("dtype", "float31"),
    ("dtype", jnp.int32),
    ("drop_path_rate", "0.5"),
    ("drop_path_rate", float("nan")),
    ("implementation", "fast"),
  ):
    with pytest.raises(ValueError, match=f"{name} must be"):
      smj.from_pretrained(tmp_path / "x", **{name: value})


INTEGER = "must be an integer of 1 to 1073741824, not "
INTEGERS = "must be a list of integers of 1 to 1073741824, not "
RATIO = "mlp_ratio must be a number over 0, up to 1000, not "
RATE = "drop_path_rate must be a number of 0 or more, below 1, not "
WRONG = [
  ({"dims": [4, 8]}, "dims (4, 8), and model.safetensors has (4, 4)"),
  ({"depths": [1, 10**9]}, "depths must be at most 1024"),
  ({"num_classes": 4}, "config.json has num_classes 4"),
  ({"mlp_ratio": 2.0}, "misshapen (layers.0.blocks.0.mlp.fc1.bias"),
  ({"out_indices": [0]}, "missing (outnorm0"),
  ({"out_indices": [2]}, "out_indices (2,) exceed the 2 stages"),
  ({"out_indices": [-1]}, "out_indices must be a list of integers of 0"),
  ({"depth": [1]}, "unknown field depth: choose from dims"),
  ({"\x1b[2J": 1}, r"unknown field \x1b[2J: choose"),
  ({"model_type": "vit"}, "model_type is not spatial_mamba"),
  ({"model_type": ["spatial_mamba"]}, "model_type is not spatial_mamba"),
  ({"architectures": "x"}, "architectures must be a list of names"),
  *(({"dims": x}, f"dims {INTEGERS}{x!r}") for x in (
    "44", "wide", [4.7, 4], [4.0, 4], [True, 4], [0, 4], [-4, 4], [], 4, None,
    ["4", 4], {"0": 4}, [[4], 4], [2**40, 4],
  )),
  ({"dims": [3, 4]}, "dims[0] must be even"),
  ({"depths": [1]}, "must name the same stages"),
  *(({name: x}, f"{name} {INTEGER}{x!r}") for x in (
    3.0, True, "3", None, [3], 0, -3, 2**40
  ) for name in ("num_classes", "d_state", "expand")),
  *(({"mlp_ratio": x}, f"{RATIO}{x!r}") for x in (
    1e308, 1e12, -4, 0, None, "4", True, [4.0]
  )),
  *(({"drop_path_rate": x}, f"{RATE}{x!r}") for x in (1, -0.1, None, "0")),
  *(({"dtype": x}, f"dtype must be one of {y}") for y in ('"float32", ',)
    for x in (None, 32, "float31", "int32", "complex64", ["float32"], "O")),
  *(({"implementation": x}, "implementation must be one of null, ") for x in (
    ["x"], "../../etc", 1, False
  )),
  *(({"remat": x}, "remat must be one of null, true, false") for x in (
    "yes", [1], 1, 0.0
  )),
]  # fmt: skip


def test_every_field_is_checked(saved, load, tmp_path):
  good = json.loads((saved / "config.json").read_text())
  for change, message in WRONG:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
      load(json.dumps({**good, **change}).encode())
    assert str(tmp_path) in str(error.value)
    assert str(error.value).isprintable()
  for name in ("dims", "depths"):
    with pytest.raises(ValueError, match=f"config.json .*it has no {name}"):
      load(json.dumps({k: x for k, x in good.items() if k != name}).encode())


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "Expecting value"),
    (b"{", "Expecting property name"),
    (b"[]", "it is not a dictionary"),
    (b"{}", "its model_type is not"),
    (b"\0", "Expecting value"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"dims": [4], "dims": [4]}', "two values for dims"),
    (b'{"mlp_ratio": Infinity}', "Infinity is not a number"),
    (b'{"mlp_ratio": -NaN}', "Expecting value"),
    (b'{"num_classes": ' + b"9" * 5000 + b"}", "4300 digits"),
    (b'{"caf\xe9": 1}', "can't decode"),
    (b" " * 2**20 + b"{}", "longer than 1,048,576 bytes"),
  ],
)
def test_an_invalid_config_is_refused(load, content, message):
  with pytest.raises(ValueError, match=rf"config\.json .*{message}") as error:
    load(content)
  assert len(str(error.value)) < 400


def test_encodings_of_json(saved, load, small):
  text = (saved / "config.json").read_text()
  for encoding in ("utf-8-sig", "utf-16"):
    assert load(text.encode(encoding)).config == small.config


def test_invalid_directories_are_named(small, tmp_path):
  with pytest.raises(FileNotFoundError, match="is not a directory"):
    smj.from_pretrained(tmp_path / "nothing")
  smj.save_pretrained(small, tmp_path / "x")
  config = tmp_path / "x" / "config.json"
  config.unlink()
  with pytest.raises(FileNotFoundError, match=r"config\.json"):
    smj.from_pretrained(tmp_path / "x")
  config.mkdir()
  with pytest.raises(OSError, match=r"config\.json is not a file"):
    smj.from_pretrained(tmp_path / "x")


def test_fields_of_a_mixer_are_those_of_its_family(
  load, saved, small_vmamba, tmp_path
):
  good = json.loads((saved / "config.json").read_text())
  fields = {"gate": True, "conv_bias": True}
  for change, message in (
    ({"gate": False}, "unknown field gate: choose from dims"),
    ({"model_type": "vmamba"}, "model_type vmamba, and model.safetensors has"),
    ({"model_type": "vmamba", "gate": 1}, "gate must be one of true, false"),
  ):
    with pytest.raises(ValueError, match=message):
      load(json.dumps({**good, **change}).encode())
  smj.save_pretrained(small_vmamba, tmp_path / "x")
  path = tmp_path / "x" / "config.json"
  good = json.loads(path.read_text())
  assert good["model_type"] == "vmamba"
  assert {name: good[name] for name in fields} == fields
  for name in fields:
    path.write_text(json.dumps({**good, name: False}))
    with pytest.raises(ValueError, match=f"{name} False, and model.safete"):
      smj.from_pretrained(tmp_path / "x")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize(
  ("family", "own"), [("spatial_mamba", "spatial_mamba"), ("vmamba", "ss2d")]
)
def test_a_network_with_any_mixer(family, own, mixer, tmp_path):
  config = get_model_config(
    f"{family}_micro", mixer=MIXERS[mixer], dims=(8,), depths=(2,)
  )
  model = filled(config)
  smj.save_pretrained(model, tmp_path / "x")
  fields = json.loads((tmp_path / "x" / "config.json").read_text())
  assert fields.get("mixer") == (None if mixer == own else mixer)
  back = smj.from_pretrained(tmp_path / "x")
  assert back.config == config
  assert_same_weights(back, model)
  # Blocks of different structure keep theirs.
  fresh = nnx.eval_shape(
    lambda: config.family.classifier(config, rngs=nnx.Rngs(0))
  )
  for before, after in zip(fresh.stages, back.stages, strict=True):
    for one, other in zip(before.blocks, after.blocks, strict=True):
      assert nnx.graphdef(one) == nnx.graphdef(other)
  tensors = smj.convert.to_torch(model)
  # The names of the mixer's authors, after those of the network's.
  block = model.stages[0].blocks[0]
  prefix = names_of(model).anchor
  of_mixer = smj.convert.to_torch(block.mixer)
  copies = MIXER_TABLES[type(block.mixer)].copies
  for name in of_mixer.keys() - copies.keys():
    np.testing.assert_array_equal(tensors[prefix + name], of_mixer[name])
  # A file does not name its mixer.
  if mixer != own:
    with pytest.raises(
      ValueError, match=r"with the mixer|does not fit|instead of"
    ):
      smj.convert.from_torch(infer_model(tensors), tensors)
    model = infer_model(tensors, config.mixer)
  assert smj.convert.from_torch(model, tensors) == ((), ())


def test_a_mixer_of_ones_own_keeps_its_names(tmp_path):
  class OwnConfig(type(MIXERS["ss2d"])):
    name = "own"

  config = get_model_config(
    "spatial_mamba_micro", mixer=OwnConfig(), dims=(8,), depths=(1,)
  )
  model = filled(config)
  tensors = smj.convert.to_torch(model)
  assert "layers.0.blocks.0.self_attention.ssm.A_log" in tensors
  assert smj.convert.from_torch(model, tensors) == ((), ())
  with pytest.raises(ValueError, match="the mixer own cannot be described"):
    smj.save_pretrained(model, tmp_path / "x")


def test_class_names_and_preprocessing_are_kept(small, load, saved, tmp_path):
  config = dataclasses.replace(
    small.config,
    class_names=("cat", "ďog", "a\nb"),
    preprocessing=smj.Preprocessing(
      image_size=32, short_side=40, mean=(0.5,) * 3, std=(0.25,) * 3
    ),
  )
  model = nnx.clone(small)
  model.config = config
  smj.save_pretrained(model, tmp_path / "x")
  assert smj.from_pretrained(tmp_path / "x").config == config
  path = tmp_path / "x" / "preprocessor_config.json"
  fields = json.loads(path.read_text())
  for change, message in (
    ({"crop_size": {"height": 32, "width": 16}}, "a square crop_size"),
    ({"resample": 2}, "no other resample than 3"),
    ({"size": {"shortest_edge": 31}}, "at most short_side=31"),
    ({"image_std": [0.1, 0, 0.1]}, "std must be above 0"),
    ({"image_mean": ["0.5"] * 3}, "numbers as image_mean"),
  ):
    path.write_text(json.dumps({**fields, **change}))
    with pytest.raises(ValueError, match=rf"preprocessor_config.*{message}"):
      smj.from_pretrained(tmp_path / "x")
  good = json.loads((saved / "config.json").read_text())
  for names, message in (
    ({"0": "a", "2": "b", "1": 3}, "id2label must be a name for each class"),
    ({"0": "a", "2": "b", "3": "c"}, "has no name of class '1'"),
    ({"0": "a", "1": "b"}, "must name all 3 classes, got 2 names"),
  ):
    with pytest.raises(ValueError, match=message):
      load(json.dumps({**good, "id2label": names}).encode())


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_replaced_head_survives(saved, tmp_path, use_bias):
  model = smj.from_pretrained(saved)
  model.head = nnx.Linear(4, 7, use_bias=use_bias, rngs=nnx.Rngs(5))
  smj.save_pretrained(model, tmp_path / "x")
  back = smj.from_pretrained(tmp_path / "x")
  assert isinstance(back, smj.SpatialMamba)
  assert back.config.num_classes == 7
  assert (back.head.bias is None) != use_bias
  assert_same_weights(back, model)
  assert "| classes | 7 |" in (tmp_path / "x" / "README.md").read_text()


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda rngs: nnx.Sequential(nnx.Linear(4, 7, rngs=rngs)), "a Sequential"),
    (lambda rngs: nnx.LoRALinear(4, 7, lora_rank=1, rngs=rngs), "a LoRALinear"),
    (lambda rngs: None, "a NoneType"),
    (lambda rngs: nnx.Linear(8, 7, rngs=rngs), r"head.weight is \[7, 8\]"),
  ],
)  # fmt: skip
def test_a_head_that_cannot_be_described(saved, tmp_path, make, message):
  model = smj.from_pretrained(saved)
  model.head = make(nnx.Rngs(0))
  with pytest.raises(ValueError, match=message):
    smj.save_pretrained(model, tmp_path / "x")
  assert not list(tmp_path.iterdir())


def test_another_part_that_cannot_be_described(saved, tmp_path):
  model = smj.from_pretrained(saved)
  model.stages[0].blocks[0].mlp.fc1 = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="changed model cannot be described"):
    smj.save_pretrained(model, tmp_path / "x")
