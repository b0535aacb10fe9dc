"""A compiled train step that is saved runs as one that is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_mamba_jax.training import compiled_step
from spatial_mamba_jax.training.compiled_step import (
  compile_step,
  load_step,
  save_step,
)
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.config_file import load_config
from spatial_mamba_jax.training.program import make_program
from spatial_mamba_jax.training.sharding import make_mesh
from tests.training.conftest import EXPERIMENT


def program_of(path, **changes):
  config = load_config(str(path))
  for name, value in changes.items():
    setattr(config, name, value)
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  return make_program(config, mesh, train_examples=24)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Returns the config, the program, its train step, and the step's file."""
  directory = tmp_path_factory.mktemp("saved")
  path, file = directory / "experiment.py", directory / "step.bin"
  path.write_text(EXPERIMENT)
  program = program_of(path)
  step = compile_step(program)
  save_step(file, program, step)
  return path, program, step, file


def test_the_same_step(saved):
  _, program, step, file = saved
  batch = {
    name: jnp.ones(x.shape, x.dtype) for name, x in program.batch_shapes.items()
  }
  expected, state = (
    run(program.fresh_state(), batch)
    for run in (step, load_step(file, program))
  )
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("ema_decay", 0.5, "ema_decay was 0.9 and is 0.5"),
    ("length", "4 epochs", "length was '8 epochs' and is '4 epochs'"),
  ],
)
def test_another_run_is_refused(saved, name, value, message):
  path, _, _, file = saved
  with pytest.raises(TrainingError, match=message):
    load_step(file, program_of(path, **{name: value}))


def test_a_step_of_another_source_is_refused(saved, monkeypatch):
  _, program, _, file = saved
  monkeypatch.setattr(compiled_step, "_source_digest", lambda: "new")
  with pytest.raises(TrainingError, match="source was"):
    load_step(file, program)


def test_what_the_step_does_not_depend_on_may_change(saved):
  path, _, _, file = saved
  load_step(file, program_of(path, keep_last=5, log_every="1 step"))


@pytest.mark.parametrize("content", [b"", b"[1]\nabc", b"{}\n", b"\xff"])
def test_another_file_is_refused(saved, tmp_path, content):
  _, program, _, _ = saved
  file = tmp_path / "step.bin"
  file.write_bytes(content)
  with pytest.raises(TrainingError, match="has no compiled train step"):
    load_step(file, program)


def test_a_damaged_file_is_refused(saved, tmp_path):
  _, program, _, file = saved
  damaged = tmp_path / "step.bin"
  damaged.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(TrainingError, match="is damaged"):
    load_step(damaged, program)


@pytest.mark.soak
def test_train_starts_with_it(experiment, saved, tmp_path):
  _, _, _, file = saved
  workdir = f"--workdir={tmp_path / 'run'}"
  damaged = tmp_path / "damaged.bin"
  damaged.write_bytes(file.read_bytes()[:-1])
  status, _, error = experiment.run(
    "train.py", workdir, f"--compiled={damaged}"
  )
  assert status == 2
  assert error.splitlines()[-1].startswith(f"train.py: {damaged} is damaged")
  status, _, error = experiment.run("train.py", workdir, f"--compiled={file}")
  assert status == 0, error
