"""Checkpoints on a fast disk, with copies in the working directory."""

import dataclasses
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spatial_mamba_jax.models.pure import Weights
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.local_checkpoints import (
  open_checkpoints,
)
from spatial_mamba_jax.training.optimizer import Optimizer
from spatial_mamba_jax.training.save_clock import SaveClock
from spatial_mamba_jax.training.state import initial_state
from tests.training.test_config import make_config


def state_after(step):
  weights = Weights(params={"w": jnp.full(3, float(step))}, stats={})
  # Checkpoints never call `update`.
  optimizer = Optimizer(optax.sgd(1.0).init, lambda *_: ())
  state = initial_state(weights, optimizer, ())
  return dataclasses.replace(state, step=jnp.asarray(step))


class Run:
  """A run that can be opened several times."""

  def __init__(self, workdir, local):
    self.workdir, self.local = workdir, local
    workdir.mkdir(exist_ok=True)

  def open(self, axis="data"):
    config = make_config(local_checkpoint_dir=str(self.local))
    mesh = jax.make_mesh((1,), (axis,), devices=jax.devices()[:1])
    return open_checkpoints(config, self.workdir, mesh)

  def local_steps(self):
    return sorted(
      int(path.name) for path in self.local.glob("*/*/*") if path.is_dir()
    )

  def shared_steps(self):
    return sorted(
      int(path.name) for path in (self.workdir / "checkpoints").iterdir()
    )


@pytest.fixture
def killed(tmp_path, monkeypatch):
  """A run that was killed after step 2, whose copy was not begun."""
  run = Run(tmp_path / "run", tmp_path / "fast")
  checkpoints = run.open()
  checkpoints.save(state_after(1), {"seed": 1}, wait=True)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "is_writing", lambda: True)
    checkpoints.save(state_after(2), {"seed": 2})
  checkpoints.wait()
  assert run.local_steps() == [1, 2]
  assert run.shared_steps() == [1]
  return run


def assert_restored(checkpoints, step):
  assert checkpoints.experiment(step) == {"seed": step}
  state = checkpoints.restore_state(step, state_after(0))
  np.testing.assert_array_equal(state.weights.params["w"], [step] * 3)


def test_a_run_resumes_from_the_local_disk(killed, capsys):
  with killed.open() as checkpoints:
    assert checkpoints.newest() == 2
    assert_restored(checkpoints, 2)
    assert f"step 2 is restored from {killed.local}" in capsys.readouterr().err
    # An evaluation needs the checkpoint in the working directory.
    checkpoints.save(state_after(2), {"seed": 2}, wait=True)
    assert killed.shared_steps() == [1, 2]
    checkpoints.save(state_after(3), {"seed": 3})  # No other copy is under way.
  assert killed.shared_steps() == [2, 3]
  assert not list(killed.local.iterdir())  # All is in the working directory.


def test_what_each_tier_costs(killed):
  with killed.open() as checkpoints:
    checkpoints.save(state_after(3), {"seed": 3}, wait=True)
    saves = [checkpoints.finished_save() for _ in range(3)]
  assert saves[2] is None
  assert [save.is_local for save in saves[:2]] == [True, False]
  assert [save.step for save in saves[:2]] == [3, 3]


@pytest.mark.parametrize("kind", ["content", "digests", "step"])
def test_a_damaged_local_checkpoint_is_not_used(killed, kind, capsys):
  (path,) = killed.local.glob("*/*/2")
  if kind == "content":
    damage(path)
  if kind == "digests":  # As of a save that was killed.
    (path / "digests.json").unlink()
  if kind == "step":
    shutil.rmtree(path)
  with killed.open() as checkpoints:
    said = f"{path.parent}: removing step 2, damaged or not whole"
    assert (said in capsys.readouterr().err) == (kind != "step")
    assert killed.local_steps() == [1]
    assert checkpoints.newest() == 1
    assert_restored(checkpoints, 1)
    checkpoints.save(state_after(2), {"seed": 2})
  assert killed.shared_steps() == [1, 2]


def test_a_lost_disk_and_a_lost_workdir(killed):
  copy = shutil.copytree(killed.local, killed.local.with_name("copy"))
  shutil.rmtree(killed.local)
  with killed.open() as checkpoints:
    assert checkpoints.newest() == 1
    assert_restored(checkpoints, 1)
  shutil.copytree(copy, killed.local, dirs_exist_ok=True)
  shutil.rmtree(killed.workdir / "checkpoints")
  with killed.open() as checkpoints:
    assert checkpoints.newest() == 2
    assert_restored(checkpoints, 2)


def test_local_checkpoints_are_of_one_run(killed):
  """A new run and a copy of a run find nothing, though the disk is the same."""
  new = Run(killed.workdir.with_name("new"), killed.local)
  with new.open() as checkpoints:
    assert checkpoints.newest() is None
  copy = shutil.copytree(killed.workdir, killed.workdir.with_name("copy"))
  with Run(copy, killed.local).open() as checkpoints:
    assert checkpoints.newest() == 1
  assert killed.local_steps() == [1, 2]


def test_local_checkpoints_are_of_one_mesh(killed, capsys):
  with killed.open(axis="fsdp") as checkpoints:
    assert "some of another mesh" in capsys.readouterr().err
    assert checkpoints.newest() == 1
    assert killed.local_steps() == [1, 2]  # The first mesh may come back.
    checkpoints.save(state_after(2), {"seed": 2}, wait=True)
  assert not killed.local_steps()  # All is in the working directory.


def damage(directory):
  (directory / "state" / "manifest.ocdbt").write_bytes(b"")


def test_the_newest_whole_checkpoint_is_used_wherever_it_is(killed, capsys):
  with killed.open() as checkpoints:
    for step in (3, 4, 5):
      # As without the option: in the working directory alone.
      super(type(checkpoints), checkpoints).save(
        state_after(step), {"seed": step}, wait=True
      )
    damage(killed.workdir / "checkpoints" / "5")
    assert checkpoints.newest() == 4
    damage(killed.workdir / "checkpoints" / "4")
    capsys.readouterr()
    # Older ones were pruned; the local one is newer than the first.
    assert checkpoints.newest() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "skipping step 5, which is damaged" in line
    assert line.endswith("using step 2")
    assert_restored(checkpoints, 2)
    checkpoints.set_aside_after(2)
    assert killed.local_steps() == [1, 2]


def test_a_damaged_copy_is_saved_again(killed, capsys):
  """The local checkpoint is the only whole one of the last step."""
  with killed.open() as checkpoints:
    checkpoints.save(state_after(2), {"seed": 2}, wait=True)
    copy = killed.workdir / "checkpoints" / "2"
    damage(copy)
    assert checkpoints.newest() == 2
    checkpoints.set_aside_after(2)
    assert "step 2 is damaged" in capsys.readouterr().err
    assert not checkpoints.is_evaluated(2)
    assert (copy.parent / "2.damaged").is_dir()
    checkpoints.save(state_after(2), {"seed": 2}, wait=True)
  with killed.open() as checkpoints:
    assert_restored(checkpoints, 2)
  # Nothing is removed that is not in the working directory.
  shutil.rmtree(killed.workdir / "checkpoints")
  with killed.open() as checkpoints:
    checkpoints.save(state_after(3), {"seed": 3})
    checkpoints.wait()
    shutil.rmtree(killed.workdir / "checkpoints" / "3")
  assert killed.local_steps() == [3]


def test_a_copy_does_not_wait_for_the_local_disk(killed, monkeypatch):
  may_end, written = threading.Event(), SaveClock.written

  def slow(clock, *arguments):
    may_end.wait(60)
    written(clock, *arguments)

  monkeypatch.setattr(SaveClock, "written", slow)
  with killed.open() as checkpoints:
    begun = time.monotonic()
    checkpoints.save(state_after(3), {"seed": 3})
    assert time.monotonic() - begun < 30
    may_end.set()
  assert killed.shared_steps() == [1, 3]


def test_a_local_disk_that_cannot_be_written(tmp_path):
  run = Run(tmp_path / "run", tmp_path / "fast")
  run.local.write_text("")
  with pytest.raises(TrainingError, match=r"cannot write to .*Not a") as error:
    run.open()
  assert str(error.value).startswith("config.local_checkpoint_dir: ")
  assert str(error.value).endswith("choose another directory, or leave it out")
