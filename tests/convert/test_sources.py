"""Checkpoints with other keys, wrappers, counters, or without a head."""

import json
import re
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import safetensors.numpy

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.__main__ import convert, main
from spatial_mamba_jax.convert.files import read_file

ONE = np.zeros(1, np.float32)


@pytest.fixture(scope="session")
def tensors(small):
  return smj.convert.to_torch(small)


@pytest.fixture(scope="session")
def other(tensors):
  """Tensors of another model, which must not be read."""
  return {name: np.zeros_like(x) for name, x in tensors.items()}


def below(prefix, tensors):
  return {prefix + name: x for name, x in tensors.items()}


def without(names, tensors):
  return {k: x for k, x in tensors.items() if not k.endswith(names)}


def module(modules):
  return modules["mmengine"].HistoryBuffer()


# {case: (content from the right and the wrong tensors, options, words)}.
TAKEN = {
  "timm's average": (
    lambda x, y: {"state_dict": y, "state_dict_ema": x},
    {},
    ["from 'state_dict_ema'", "--key selects others: state_dict)"],
  ),
  "timm's weights": (
    lambda x, y: {"state_dict": x, "state_dict_ema": y},
    {"raw": True},
    ["from 'state_dict' (--key selects others: state_dict_ema)"],
  ),
  "an average that is off": (
    lambda x, _: {"model_ema": None, "ema_state_dict": {}, "model": x},
    {},
    ["from 'model'"],
  ),
  "DeepSpeed's": (
    lambda x, _: {"module": x, "ds_version": "0.14"},
    {},
    ["from 'module'"],
  ),
  "PyTorch's tutorial": (
    lambda x, _: {"model_state_dict": x, "optimizer": {"state": {0: ONE}}},
    {},
    ["from 'model_state_dict'"],
  ),
  "a key of one's own": (lambda x, _: {"net": x, "epoch": 3}, {}, ["'net'"]),
  "a defaultdict": (lambda x, _: {"model": defaultdict(int, x)}, {}, []),
  "a dictionary in order": (lambda x, _: OrderedDict(x), {}, []),
  "a key": (
    lambda x, y: {"model": y, "student": x},
    {"key": "student"},
    ["from 'student' (--key selects others: model)"],
  ),
  "a key inside another": (
    lambda x, y: {"model": y, "state": {"model": x}},
    {"key": "state.model"},
    ["from 'state.model'"],
  ),
  "a key with a dot": (lambda x, _: {"a.b": x}, {"key": "a.b"}, ["'a.b'"]),
  "a key that is a prefix": (
    lambda x, y: {"state_dict": below("a.", y) | below("b.module.", x)},
    {"key": "state_dict.b"},
    ["from 'state_dict.b'", "the prefixes module.;", "left out 126 tensors"],
  ),
  "wrappers in wrappers": (
    lambda x, _: {"model": below("module._orig_mod.model.backbone.", x)},
    {},
    ["without the prefixes module., _orig_mod., model.backbone."],
  ),
  "compiled blocks": (
    lambda x, _: {
      name.replace("blocks.0.", "blocks.0._orig_mod."): tensor
      for name, tensor in below("_orig_mod.", x).items()
    },
    {},
    ["without the prefixes _orig_mod."],
  ),
  "Lightning's": (
    lambda x, _: {"state_dict": below("net.", x) | {"loss.weight": ONE}},
    {},
    ["the prefixes net.; left out 1 tensors", "(loss.weight)"],
  ),
  "an average by prefix": (
    lambda x, y: {"state_dict": below("m.", y) | below("ema_m.module.", x)},
    {},
    ["(--key selects others: state_dict.m)", "ema_m."],
  ),
  "weights by prefix": (
    lambda x, y: below("m.", x) | below("ema_m.module.", y),
    {"raw": True},
    ["(--key selects others: ema_m.module)", "the prefixes module., m.;"],
  ),
  "PyTorch's average": (
    lambda x, _: below("module.", x) | {"n_averaged": np.array([3])},
    {},
    ["without the prefixes module.; left out 1 tensors", "(n_averaged)"],
  ),
  "thop's counters": (
    lambda x, _: {
      "model": x | {"total_ops": ONE, "layers.0.blocks.0.total_params": ONE}
    },
    {},
    ["left out 2 tensors", "(total_ops, layers.0.blocks.0.total_params)"],
  ),
}


OF_VMAMBA = ("wrappers in wrappers", "compiled blocks", "an average by prefix")


@pytest.mark.parametrize(
  ("model", "name"),
  [
    *(("small", name) for name in TAKEN),
    *(("small_vmamba", name) for name in OF_VMAMBA),
  ],
)
def test_the_command_says_what_it_reads(
  request, write_checkpoint, tmp_path, model, name
):
  tensors = smj.convert.to_torch(request.getfixturevalue(model))
  other = {key: np.zeros_like(x) for key, x in tensors.items()}
  make, options, words = TAKEN[name]
  path = write_checkpoint(tmp_path / "x.pth", make(tensors, other))
  said = convert(path, tmp_path / "out.safetensors", **options)
  for word in words:
    assert word in said
  found = safetensors.numpy.load_file(tmp_path / "out.safetensors")
  assert found.keys() == tensors.keys()
  for key, x in tensors.items():
    np.testing.assert_array_equal(found[key], x, strict=True)


def test_counts_of_updates_are_not_required(
  tensors, write_checkpoint, tmp_path
):
  path = write_checkpoint(
    tmp_path / "x.pth", without("num_batches_tracked", tensors)
  )
  convert(path, tmp_path / "out")
  found = smj.convert.to_torch(smj.from_pretrained(tmp_path / "out"))
  for name, x in tensors.items():
    np.testing.assert_array_equal(found[name], x, strict=True)


@pytest.mark.parametrize(
  ("make", "options", "message"),
  [
    (
      lambda modules, x: {"model": module(modules), "epoch": 3},
      {},
      "'model' is 'mmengine.HistoryBuffer', not a dictionary: save its",
    ),
    (lambda _, x: {"model": [1]}, {}, "'model' is a list, not a dictionary"),
    (
      lambda modules, x: module(modules),
      {},
      "holds 'mmengine.HistoryBuffer', not a dictionary",
    ),
    (
      lambda _, x: {"student": x, "teacher": x},
      {},
      "its keys are 'student', 'teacher'; --key can be one of student, teacher",
    ),
    (
      lambda _, x: {"model": x},
      {"key": "modle"},
      "no dictionary 'modle'; its keys are 'model'",
    ),
    (
      lambda _, x: {"model": x},
      {"key": "model.a.b"},
      "none of its 126 tensors (",
    ),
    (lambda _, x: x, {"key": "\x1b[2J"}, r"below the key '\x1b[2J'"),
    (
      lambda _, x: {"model": x, "\x1b[2J": {"x": [1]}},
      {"key": "other"},
      r"its keys are 'model', '\x1b[2J'",
    ),
    (
      lambda _, x: x | below("module.", x),
      {},
      "and module.",
    ),
    (
      lambda _, x: without(("head.weight", "head.bias"), x),
      {},
      "config.init_from of train.py can start a run",
    ),
  ],
)  # fmt: skip
def test_the_command_explains_what_it_refuses(
  tensors, write_checkpoint, tmp_path, make, options, message
):
  path = write_checkpoint(
    tmp_path / "x.pth", lambda modules: make(modules, tensors)
  )
  with pytest.raises(ValueError, match=re.escape(message)) as error:
    convert(path, tmp_path / "out", **options)
  assert "x.pth" in str(error.value)
  assert str(error.value).isprintable()


def test_the_key_on_the_command_line(
  tensors, other, write_checkpoint, tmp_path, capsys
):
  path = write_checkpoint(tmp_path / "x.pth", {"model": other, "mine": tensors})
  out = tmp_path / "out"
  assert main([str(path), str(out), "--key=mine"]) == 0
  assert "from 'mine' (--key selects others: model)" in capsys.readouterr().out
  assert main([str(out), str(tmp_path / "2"), "--key=mine"]) == 2
  assert "is below the key 'mine'" in capsys.readouterr().err
  convert(out, tmp_path / "run" / "1")
  assert main([str(tmp_path / "run"), str(tmp_path / "2"), "--key=mine"]) == 2
  assert "--key is for files" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    main([str(path), str(out), "--key=mine", "--raw"])


def test_directories_of_hugging_face(tensors, write_checkpoint, tmp_path):
  path = tmp_path / "trained"
  path.mkdir()
  write_checkpoint(path / "pytorch_model.bin", below("model.", tensors))
  assert read_file(path).prefixes == ("model.",)
  (path / "pytorch_model.bin").unlink()
  index = path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {}}))
  for name in (path, index):
    with pytest.raises(ValueError, match="its weights in several files"):
      convert(name, tmp_path / "out")


def test_a_head_without_a_bias(each_small, write_checkpoint, tmp_path):
  whole = smj.convert.to_torch(each_small)
  (bias,) = (name for name in whole if name.endswith("head.bias"))
  tensors = without("head.bias", whole)
  path = write_checkpoint(tmp_path / "x.pth", tensors)
  assert "no bias in the head" in convert(path, tmp_path / "out")
  model = smj.from_pretrained(tmp_path / "out")
  assert isinstance(model, smj.Classifier)
  assert model.head.bias is None
  # The checkpoints of a run always have a bias.
  convert(path, tmp_path / "run" / "1")
  convert(tmp_path / "run", tmp_path / "back")
  found = smj.convert.to_torch(smj.from_pretrained(tmp_path / "back"))
  expected = tensors | {bias: np.zeros(3, np.float32)}
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(found[name], x, strict=True)


def test_relative_paths_and_home(small, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  smj.save_pretrained(small, "a")
  for src, dst in (("a", "~/b"), ("~/b", "run/checkpoints/1"), ("run", "~/c")):
    assert main([src, dst]) == 0
  smj.from_pretrained("~/c")
  assert sorted(x.name for x in (tmp_path / "home").iterdir()) == ["b", "c"]
  capsys.readouterr()
  for paths in (("gs://bucket/x", "d"), ("a", "s3://bucket/x")):
    assert main(list(paths)) == 2
    assert "of this machine" in capsys.readouterr().err
  assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "home", "run"]
