"""Exported models in processes that have JAX and not this project."""

import errno
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import spatial_mamba_jax as smj
from spatial_mamba_jax.export.__main__ import main
from spatial_mamba_jax.models.pure import PureModel
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.checkpoint import Checkpoints
from spatial_mamba_jax.training.config import ModelSection, TrainConfig
from spatial_mamba_jax.training.experiment import to_dict
from spatial_mamba_jax.training.optimizer import make_optimizer, make_schedule
from spatial_mamba_jax.training.state import initial_state

# A script that has only the file.
STRANGER = """
import sys
sys.modules.update(dict.fromkeys(
  ["spatial_mamba_jax", "spatial_mamba_kernels", "flax", "optax"]
))
import numpy as np
from jax import export

path, *images = sys.argv[1:]
with open(path, "rb") as file:
  model = export.deserialize(bytearray(file.read()))
for path in images:
  np.save(path + ".out.npy", model.call(np.load(path)))
"""


def create(make=smj.create_model, **overrides):
  settings = {"dims": (4, 4), "depths": (1, 2), **overrides}
  return make("spatial_mamba_micro", rngs=nnx.Rngs(0), **settings)


def images_of(*shape):
  return np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)


def run_elsewhere(path, batches):
  """Returns the outputs of a fresh process for each batch."""
  names = [str(path.with_name(f"{i}.npy")) for i in range(len(batches))]
  for name, batch in zip(names, batches, strict=True):
    np.save(name, batch)
  subprocess.run(
    (sys.executable, "-I", "-c", STRANGER, str(path), *names),
    env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    check=True,
  )
  return [np.load(name + ".out.npy") for name in names]


@nnx.jit
def apply(model, images):
  return model(images)


@pytest.mark.parametrize(
  ("image_size", "shapes"),
  [
    pytest.param(16, [(1, 16, 16), (3, 16, 16)], marks=pytest.mark.soak),
    (None, [(2, 16, 16), (1, 21, 5)]),
  ],
  ids=["fixed", "any"],
)
def test_a_process_without_the_project_gets_the_logits(
  tmp_path, image_size, shapes
):
  model = create(d_state=2, implementation="associative")
  path = tmp_path / "model.stablehlo"
  exported = smj.export_model(model, path, image_size=image_size)
  assert exported.platforms == ("cpu", "cuda", "tpu")
  weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
  # The weights of a real model outweigh the program.
  assert weights < path.stat().st_size < weights + 500_000
  batches = [images_of(*shape) for shape in shapes]
  for batch, logits in zip(batches, run_elsewhere(path, batches), strict=True):
    np.testing.assert_allclose(logits, apply(model, batch), atol=1e-5, rtol=0)
  assert model.stages[0].blocks[0].mixer.implementation == "associative"


def test_micro_is_the_authors_after_export(tmp_path, golden, named_weights):
  model = smj.create_model("spatial_mamba_micro", rngs=nnx.Rngs(1))
  smj.convert.from_torch(model, named_weights.named_state_dict("micro"))
  path = tmp_path / "micro.stablehlo"
  smj.export_model(model, path, image_size=(50, 70))
  images = np.moveaxis(named_weights.named_images(2, 50, 70, 0), 1, 3)
  (logits,) = run_elsewhere(path, [images.astype(np.float32)])
  expected = golden("micro")["logits_50x70"]
  np.testing.assert_allclose(
    logits, expected, atol=1e-4 * abs(expected).max(), rtol=0
  )


def test_a_backbone_keeps_its_features(tmp_path):
  backbone = create(smj.create_backbone, out_indices=(0, 1), dtype="bfloat16")
  exported = smj.export_model(backbone, tmp_path / "b", image_size=(16, 24))
  reread = export.deserialize(bytearray((tmp_path / "b").read_bytes()))
  assert [str(x.str_short()) for x in reread.out_avals] == [
    "bfloat16[b,4,6,4]",
    "bfloat16[b,2,3,4]",
  ]
  assert reread.mlir_module() == exported.mlir_module()


def test_a_wrong_call_is_explained_and_keeps_the_old_file(tmp_path):
  path = tmp_path / "old"
  path.write_text("old")
  for size in (0, (16, -1)):
    with pytest.raises(ValueError, match="image_size must be"):
      smj.export_model(create(), path, image_size=size)
  model = create()
  model.train()
  with pytest.raises(ValueError, match="call model"):
    smj.export_model(model, path)
  with pytest.raises(ValueError, match="plain_mamba is exported for images of"):
    smj.export_model(create(mixer="plain_mamba"), path, image_size=None)
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def checkpoints(tmp_path):
  """A run with two checkpoints, of which the first is better."""
  config = TrainConfig(
    task=ClassificationConfig(num_classes=3),
    model=ModelSection(dims=(4, 4), depths=(1, 2)),
  )
  task = config.create_task()
  model = PureModel(task.network)
  times = config.count_steps(config.batch_size)
  schedule = make_schedule(
    config.optimizer, batch_size=8, warmup_steps=times.warmup, steps=times.steps
  )
  optimizer = make_optimizer(config.optimizer, schedule, model)
  directory = tmp_path / "run" / "checkpoints"
  with Checkpoints(directory) as manager:
    for step, top1 in ((1, 0.9), (2, 0.1)):
      weights = model.init(jax.random.key(step))
      state = initial_state(weights, optimizer, task.sums)
      state = state.replace(step=jnp.int32(step))
      evaluation = Evaluation(top1, {"top1": top1}, f"top-1 {top1:.2%}")
      manager.save(state, to_dict(config))
      manager.add_evaluation(step, evaluation)
  return directory, model


def test_the_command(checkpoints, tmp_path, monkeypatch, capsys):
  directory, model = checkpoints
  out = tmp_path / "home" / "model.stablehlo"
  out.parent.mkdir()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(out.parent))
  relative = str(directory.relative_to(tmp_path))
  assert main([relative, "~/model.stablehlo", "--image_size=16x8"]) == 0
  assert list(out.parent.iterdir()) == [out]
  printed = capsys.readouterr().out
  assert (
    "normalised images float32[b,16,8,3] to float32[b,3], for cpu" in printed
  )
  batch = images_of(2, 16, 8)
  weights = model.init(jax.random.key(1))
  call = export.deserialize(bytearray(out.read_bytes())).call

  @jax.jit
  def logits(weights):
    return model.apply(weights, lambda network: network(batch), train=False)[0]

  np.testing.assert_allclose(call(batch), logits(weights), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
  ("checkpoint", "out", "message"),
  [
    ("nowhere", "x", "does not exist"),
    ("run/checkpoints/3", "x", "does not exist"),
    ("run/checkpoints", "no/such/x", "No such file or directory"),
    ("run/checkpoints", "run", "Is a directory"),
    ("run/checkpoints", "pipe", "is not a file and is not overwritten"),
    ("run/checkpoints", "x" * 300, "File name too long"),
    ("run/checkpoints", "run/x/y", "Not a directory"),
    ("s3://bucket/run", "x", "of this machine"),
  ],
)
def test_a_mistake_is_one_line(
  checkpoints, tmp_path, monkeypatch, capsys, checkpoint, out, message
):
  monkeypatch.chdir(tmp_path)
  os.mkfifo("pipe")
  (tmp_path / "run" / "x").touch()
  before = sorted(tmp_path.iterdir())
  assert main([checkpoint, out]) == 2
  assert sorted(tmp_path.iterdir()) == before
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("export: ")
  assert message in line


def test_a_known_mistake_is_reported_before_tracing(
  tmp_path, monkeypatch, capsys
):
  def trace(*arguments, **options):
    raise AssertionError("traced")

  monkeypatch.setattr(export, "export", trace)
  model = create()
  smj.save_pretrained(model, tmp_path / "model")
  with pytest.raises(FileNotFoundError, match="no/such/x"):
    smj.export_model(model, tmp_path / "no/such/x")
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match="flatbuffers is missing: pip"):
      smj.export_model(model, tmp_path / "x")
    # No checkpoint is read either.
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line == 'export: flatbuffers is missing: pip install ".[export]"'
  assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "old"
  path.write_text("old")
  write = pathlib.Path.write_bytes

  def fill(self, content):
    write(self, content[:100])
    if content:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(pathlib.Path, "write_bytes", fill)
  with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
    smj.export_model(create(), path, image_size=16)
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", ["0", "x", "3x", "1x2x3", "-4", "all"])
def test_a_wrong_size_is_explained(capsys, size):
  with pytest.raises(SystemExit):
    main(["a", "b", f"--image_size={size}"])
  assert f"must be N, HxW or any, not '{size}'" in capsys.readouterr().err
