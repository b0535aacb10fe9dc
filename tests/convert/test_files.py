"""Conversion of weights from every format to every format."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.__main__ import convert, main
from spatial_mamba_jax.convert.architecture import (
  abstract_model,
  infer_config,
  infer_model,
)
from spatial_mamba_jax.convert.names import variables
from spatial_mamba_jax.models.presets import get_model_config

ROOT = pathlib.Path(__file__).parents[2]


def run_python(*arguments):
  return subprocess.run(
    (sys.executable, *map(str, arguments)),
    cwd=ROOT,
    capture_output=True,
    check=False,
    text=True,
    env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "JAX_PLATFORMS": "cpu"},
  )


def assert_same_weights(model, expected):
  tensors, expected = map(smj.convert.to_torch, (model, expected))
  assert list(tensors) == list(expected)
  for name, x in expected.items():
    np.testing.assert_array_equal(tensors[name], x, strict=True)


@pytest.mark.parametrize(
  ("options", "key"), [((), "model_ema"), (("--raw",), "model")]
)
def test_the_authors_checkpoint_gives_their_logits(
  micro_checkpoint, named_weights, golden, tmp_path, capsys, options, key
):
  directory = tmp_path / "new" / "micro"
  assert main([*options, str(micro_checkpoint), str(directory)]) == 0
  assert f"10 classes, from '{key}'" in capsys.readouterr().out
  model = smj.from_pretrained(directory)
  images = named_weights.named_images(2, 64, 64, 0).transpose(0, 2, 3, 1)
  logits = nnx.jit(lambda model, images: model(images))(model, images)
  expected = golden("checkpoint_micro")[key]
  # Both are float32 and sum in different orders.
  np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", smj.list_models())
def test_presets_are_inferred_from_their_tensors(named_weights, name):
  family, size = name.rsplit("_", 1)
  if family == "vmamba":
    file = ROOT / f"tests/golden/mixers/vmamba_state_dict_{size}.json"
    shapes = json.loads(file.read_text())
  else:
    shapes = named_weights.state_dict_shapes(size)
  tensors = {k: np.broadcast_to(np.float32(0), v) for k, v in shapes.items()}
  assert infer_config(tensors) == get_model_config(name, drop_path_rate=0.0)


SSM = {"d_state": 3, "expand": 3}


# The float 2 / 98, times 98, is less than 2.
@pytest.mark.parametrize("mlp_ratio", [0.0205, 1.1, 3.3, 4.0])
@pytest.mark.parametrize(
  ("name", "mixer"),
  [
    ("spatial_mamba_micro", SSM),
    ("vmamba_micro", {"d_state": 3, "expand": 2, "conv_bias": True}),
    ("vmamba_micro", {**SSM, "gate": True}),
  ],
)
def test_the_architecture_is_inferred_from_tensors(name, mixer, mlp_ratio):
  config = get_model_config(
    name,
    dims=(98, 49),
    depths=(2, 1),
    in_channels=4,
    num_classes=7,
    mlp_ratio=mlp_ratio,
    **mixer,
  )
  model = abstract_model(config)
  for _, variable in variables(model):
    variable.set_value(np.broadcast_to(np.float32(0), variable.shape))
  tensors = smj.convert.to_torch(model)
  filled = infer_model(tensors)
  assert smj.convert.from_torch(filled, tensors) == ((), ())
  assert filled.config == dataclasses.replace(
    config, mlp_ratio=filled.config.mlp_ratio
  )


CHANGES = [
  (
    {"layers.0.blocks.0.ln_1.weight": None},
    r"layers.0.blocks.0.ln_1.weight is",
  ),
  ({"head.weight": np.zeros(3)}, r"head.weight has shape \[3\] instead of 2"),
  ({"head.bias": np.zeros(4)}, r"head.bias is \[4\] instead of \[3\]"),
  ({"norm.bias": None}, r"1 missing \(norm.bias\)"),
  (
    {"layers.1.blocks.0.ln_2.bias": None},
    r"missing \(layers.1.blocks.0.ln_2",
  ),
  ({"layers.1.downsample.x": np.zeros(1)}, r"1 unexpected \(layers.1.down"),
]
VMAMBA_CHANGES = [
  ({"layers.0.blocks.0.norm.weight": None}, r"a VMamba: layers.0.blocks.0.no"),
  ({"patch_embed.0.weight": None}, r"a VMamba: patch_embed.0.weight is mis"),
  ({"classifier.head.weight": None}, r"its head \(classifier.head.weight\)"),
  ({"classifier.norm.bias": None}, r"1 missing \(classifier.norm.bias\)"),
  ({"layers.1.blocks.0.op.in_proj.weight": np.zeros((8, 4))}, r"of \[24, 4\]"),
  ({"layers.0.blocks.0.op.Ds": np.zeros(12)}, r"Ds is \[12\] instead of"),
  ({"layers.0.downsample.x": np.zeros(1)}, r"1 unexpected \(layers.0.down"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("model", "change", "message"),
  [
    *(("small", *x) for x in CHANGES),
    *(("small_vmamba", *x) for x in VMAMBA_CHANGES),
  ],
)
def test_tensors_that_differ_are_named(
  request, write_checkpoint, tmp_path, capsys, model, change, message
):
  tensors = smj.convert.to_torch(request.getfixturevalue(model)) | change
  tensors = {k: x for k, x in tensors.items() if x is not None}
  path = write_checkpoint(tmp_path / "x.pth", {"model": tensors})
  with pytest.raises(ValueError, match=rf"x\.pth: .*{message}"):
    convert(path, tmp_path / "out")
  assert main([str(path), str(tmp_path / "new" / "out")]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
  assert [x.name for x in tmp_path.iterdir()] == ["x.pth"]


def test_tensors_of_no_family_are_refused(write_checkpoint, tmp_path):
  tensors = {"layers.0.blocks.0.attn.qkv.weight": np.zeros((3, 1))}
  path = write_checkpoint(tmp_path / "x.pth", tensors)
  with pytest.raises(ValueError, match="of a Spatial-Mamba or VMamba: layers"):
    convert(path, tmp_path / "out")


def test_every_format_to_every_format(each_small, write_checkpoint, tmp_path):
  path = write_checkpoint(
    tmp_path / "x.pth", {"model": smj.convert.to_torch(each_small)}
  )
  for name in ("a.safetensors", "run/checkpoints/0", "directory", "b/3"):
    convert(path, tmp_path / name)
    path = tmp_path / name
  for source in (
    path,
    tmp_path / "b",
    tmp_path / "run",
    tmp_path / "directory",
  ):
    convert(source, tmp_path / f"{source.name}.out")
    model = smj.from_pretrained(tmp_path / f"{source.name}.out")
    assert_same_weights(model, each_small)


@pytest.mark.parametrize("name", ["x", "0", "x.safetensors"])
def test_an_existing_destination_is_refused(small, tmp_path, capsys, name):
  smj.save_pretrained(small, tmp_path / "model")
  (tmp_path / name).write_text("mine")
  assert main([str(tmp_path / "model"), str(tmp_path / name)]) == 2
  assert "exists and is not overwritten" in capsys.readouterr().err
  assert (tmp_path / name).read_text() == "mine"
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["x", "0", "x.safetensors"])
def test_a_failure_leaves_nothing(small, tmp_path, monkeypatch, name):
  smj.save_pretrained(small, tmp_path / "model")

  def fail(*arguments, **options):
    del options
    if isinstance(arguments[1], pathlib.Path):
      arguments[1].write_bytes(b"half")
    raise OSError("no space is left")

  from spatial_mamba_jax.training.checkpoint import Checkpoints

  monkeypatch.setattr(safetensors.numpy, "save_file", fail)
  monkeypatch.setattr(Checkpoints, "save_weights", fail)
  with pytest.raises(OSError, match="no space"):
    convert(tmp_path / "model", tmp_path / name)
  assert [x.name for x in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("checkpoints", "checkpoints/0"),
    ("007", "write the step as 7"),
    ("x.pth", "write x.safetensors and read it"),
  ],
)
def test_impossible_destinations_are_named(small, tmp_path, name, message):
  smj.save_pretrained(small, tmp_path / "model")
  with pytest.raises(ValueError, match=message):
    convert(tmp_path / "model", tmp_path / name)


def test_impossible_sources_are_named(tmp_path, capsys):
  (tmp_path / "empty").mkdir()
  (tmp_path / "x.safetensors").write_text("not one")
  (tmp_path / "x.pth").write_text("not one")
  for name in ("empty", "x.safetensors", "x.pth", "none", "none.safetensors"):
    assert main([str(tmp_path / name), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert len(error.splitlines()) == 1, error
  # Reading a pipe would block.
  os.mkfifo(tmp_path / "pipe")
  assert main([str(tmp_path / "pipe"), str(tmp_path / "out")]) == 2
  assert "pipe is not a file" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line(small, tmp_path):
  smj.save_pretrained(small, tmp_path / "model")
  # A limit on file sizes simulates the disk.
  script = """
import resource, sys
sys.dont_write_bytecode = True  # Or half of it would be written.
from spatial_mamba_jax.convert.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
source, *names = sys.argv[1:]
sys.exit(sum(main([source, name]) != 2 for name in names))
"""
  names = [tmp_path / "new" / x for x in ("out", "x.safetensors", "run/0")]
  result = run_python("-c", script, tmp_path / "model", *names)
  assert result.returncode == 0
  lines = result.stderr.splitlines()
  assert len(lines) == len(names)
  for line, name in zip(lines, names, strict=True):
    # The destination itself, and not a partial file, which is gone.
    assert line == f"convert: {name}: File too large"
  assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_files_have_the_users_permissions(small, tmp_path):
  before = os.umask(0o027)
  try:
    smj.save_pretrained(small, tmp_path / "new" / "model")
    convert(tmp_path / "new" / "model", tmp_path / "new" / "x.safetensors")
    convert(tmp_path / "new" / "model", tmp_path / "new" / "run" / "0")
  finally:
    os.umask(before)
  paths = list((tmp_path / "new").rglob("*"))
  assert len(paths) > 6
  for path in (tmp_path / "new", *paths):
    wanted = 0o750 if path.is_dir() else 0o640
    assert path.stat().st_mode & 0o777 == wanted, path


def test_a_detector_gives_its_backbone(
  each_backbone, write_checkpoint, tmp_path, capsys
):
  tensors = smj.convert.to_torch(each_backbone)
  path = write_checkpoint(
    tmp_path / "mask_rcnn.pth",
    lambda modules: {
      "meta": {"epoch": 12},
      "message_hub": modules["mmengine"].HistoryBuffer(),
      "state_dict": {
        **{f"backbone.{name}": x for name, x in tensors.items()},
        "neck.weight": np.zeros((2, 2), np.float32),
      },
    },
  )
  assert main([str(path), str(tmp_path / "backbone")]) == 0
  assert "left out 1 tensors" in capsys.readouterr().out
  model = smj.from_pretrained(tmp_path / "backbone")
  assert type(model) is type(each_backbone)
  assert_same_weights(model, each_backbone)
  config = json.loads((tmp_path / "backbone" / "config.json").read_text())
  assert config["out_indices"] == [1]
  assert "num_classes" not in config
  with pytest.raises(ValueError, match="checkpoints are of classifiers"):
    convert(path, tmp_path / "checkpoints" / "0")
  assert not (tmp_path / "checkpoints").exists()


def test_tensors_that_overlap_are_not_blown_up(small, write_archive, tmp_path):
  tensors = smj.convert.to_torch(small)
  tensors["head.weight"] = np.broadcast_to(np.float32(0), (10**9, 4))
  import spatial_mamba_jax.convert.files as files

  path = tmp_path / "x.pth"
  path.write_bytes(b"")
  with pytest.MonkeyPatch.context() as patch:
    found = files.Selected("model", (), tensors)
    patch.setattr(files, "read_first", lambda *_, **__: found)
    with pytest.raises(ValueError, match="tensors that overlap"):
      files.read_file(path)


def test_half_precision_files_are_read(small, tmp_path):
  tensors = smj.convert.to_torch(small)
  for dtype in (ml_dtypes.bfloat16, np.float16, np.float64):
    path = tmp_path / f"{np.dtype(dtype).name}.safetensors"
    safetensors.numpy.save_file(
      {k: x if x.ndim == 0 else x.astype(dtype) for k, x in tensors.items()},
      path,
    )
    convert(path, path.with_suffix(""))
    model = smj.from_pretrained(path.with_suffix(""))
    for name, x in smj.convert.to_torch(model).items():
      expected = tensors[name].astype(dtype if x.ndim else x.dtype)
      np.testing.assert_array_equal(x, expected.astype(x.dtype), strict=True)


def test_truncated_safetensors(small, tmp_path):
  smj.save_pretrained(small, tmp_path / "x")
  path = tmp_path / "x" / "model.safetensors"
  data = path.read_bytes()
  for size in (0, 7, 100, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
      smj.from_pretrained(tmp_path / "x")


def test_without_safetensors(small, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
  assert main([str(tmp_path / "x.safetensors"), str(tmp_path / "out")]) == 2
  assert "pip install safetensors" in capsys.readouterr().err
  with pytest.raises(ImportError, match="pip install safetensors"):
    smj.save_pretrained(small, tmp_path / "y")
  assert not list(tmp_path.iterdir())


def test_help_lists_the_formats():
  result = run_python("-m", "spatial_mamba_jax.convert", "--help")
  assert result.returncode == 0
  words = (".safetensors", ".pth", "config.json", "checkpoints/0", "--raw")
  for word in (*words, "--key"):
    assert word in result.stdout
