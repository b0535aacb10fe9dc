"""Checkpoints: which are kept, and how damage is handled."""

import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint._src.path import atomicity

from spatial_mamba_jax.models import ModelConfig, SpatialMamba
from spatial_mamba_jax.models.pure import PureModel, Weights
from spatial_mamba_jax.tasks.base import Evaluation
from spatial_mamba_jax.training.checkpoint import (
  Checkpoints,
  RemovedError,
  SaveError,
  open_checkpoint,
)
from spatial_mamba_jax.training.checkpoint_files import CheckpointFiles
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.optimizer import Optimizer
from spatial_mamba_jax.training.state import initial_state
from spatial_mamba_jax.training.weights import load_weights

# Warnings of callbacks that a failed save or restore leaves behind.
pytestmark = [
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
  pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
]


@pytest.fixture(autouse=True)
def _collect():
  yield
  gc.collect()  # So that no other test is blamed for them.


def state_after(step):
  weights = Weights(params={"w": jnp.full(3, float(step))}, stats={})
  # Checkpoints never call `update`.
  optimizer = Optimizer(optax.sgd(1.0).init, lambda *_: ())
  state = initial_state(weights, optimizer, ())
  ema = Weights(params={"w": jnp.full(3, step + 0.5)}, stats={})
  return state.replace(step=jnp.asarray(step), ema=ema)


def evaluation(top1):
  values = {"top1": top1, "top5": 1.0, "loss": 1.0, "ece": 0.1, "images": 9}
  return Evaluation(top1, values, f"top-1 {top1:.2%}")


def save(directory, scores, **options):
  with Checkpoints(directory, **options) as checkpoints:
    for step, top1 in scores.items():
      checkpoints.save(state_after(step), {"seed": step})
      if top1 is not None:
        checkpoints.add_evaluation(step, evaluation(top1))


def save_and_wait(checkpoints, step):
  checkpoints.save(state_after(step), {"seed": step})
  checkpoints.wait()


def assert_restored(checkpoints, step):
  assert checkpoints.experiment(step) == {"seed": step}
  state = checkpoints.restore_state(step, state_after(0))
  np.testing.assert_array_equal(state.ema.params["w"], np.full(3, step + 0.5))
  np.testing.assert_array_equal(
    state.weights.params["w"], np.full(3, float(step))
  )


def test_the_best_outlives_a_restart(tmp_path):
  for scores in ({1: 0.5, 2: 0.9, 3: 0.7}, {4: 0.8, 5: 0.6, 6: None}):
    save(tmp_path, scores, keep_last=2)
  with Checkpoints(tmp_path, create=False) as checkpoints:
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best() == 2
    assert checkpoints.newest() == 6
    assert [checkpoints.is_evaluated(x) for x in (2, 5, 6)] == [
      True,
      True,
      False,
    ]
    assert_restored(checkpoints, 6)
  like = state_after(0).ema
  for path, step in ((tmp_path, 2), (tmp_path / "5", 5)):
    with open_checkpoint(path) as (checkpoints, found):
      assert found == step
      weights = checkpoints.restore_weights(step, like)
    assert weights.keys() == {"ema", "raw"}
    assert weights["raw"].params["w"][0] == step
    assert weights["ema"].params["w"][0] == step + 0.5


@pytest.mark.parametrize("worst", [float("nan"), -float("inf")])
def test_a_nan_score_is_the_worst(tmp_path, worst):
  save(tmp_path, {1: worst, 2: -3.0, 3: worst, 4: -4.0, 5: worst}, keep_last=1)
  with Checkpoints(tmp_path, create=False) as checkpoints:
    assert checkpoints.steps() == [2, 5]
    assert checkpoints.best() == 2
    assert checkpoints.is_evaluated(5)


def test_a_score_of_a_version_before_tasks(saved, tmp_path):
  copy = shutil.copytree(saved, tmp_path / "copy")
  for step, top1 in ((1, 0.9), (3, 0.1)):
    (copy / str(step) / "metrics" / "metrics").write_text(f'{{"top1": {top1}}}')
    (copy / str(step) / "digests.json").unlink()
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.best() == 1
    assert all(checkpoints.is_evaluated(step) for step in (1, 2, 3))


def remove(path):
  path.unlink()


def empty(path):
  path.write_bytes(b"")


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def become_pipe(path):
  path.unlink()
  os.mkfifo(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Checkpoints of steps 1 to 3, of which the last is the best."""
  directory = tmp_path_factory.mktemp("saved")
  save(directory, {1: 0.1, 2: 0.2, 3: 0.3}, keep_last=3)
  return directory


@pytest.mark.parametrize("damage", [remove, empty, cut, flip, become_pipe])
def test_a_damaged_checkpoint_is_skipped(saved, tmp_path, capsys, damage):
  """Any of its files may be damaged; earlier checkpoints stay."""
  files = [
    x.relative_to(saved) for x in (saved / "3").rglob("*") if x.is_file()
  ]
  # Orbax writes it last, and nothing reads it.
  unread = ("3/_CHECKPOINT_METADATA", "3/commit_success.txt")
  assert len(files) > 15
  for i, file in enumerate(files):
    copy = shutil.copytree(saved, tmp_path / str(i))
    damage(copy / file)
    with Checkpoints(copy) as checkpoints:
      is_unread = str(file) in unread and damage is not become_pipe
      if is_unread or (file.name, damage) == ("digests.json", remove):
        assert checkpoints.newest() == 3
        assert_restored(checkpoints, 3)
        continue
      assert checkpoints.best() == checkpoints.newest() == 2, file
    for line in capsys.readouterr().err.splitlines():
      assert "skipping step 3, which is damaged (" in line
      assert line.endswith(": using step 2")
      checkpoints.set_aside_after(2)
      assert checkpoints.steps() == [1, 2]
    assert (copy / "3.damaged").is_dir()
  with Checkpoints(copy) as checkpoints:  # The step can be saved again.
    save_and_wait(checkpoints, 3)
    assert_restored(checkpoints, checkpoints.newest())


@pytest.mark.parametrize("item", ["ema", "state", "experiment"])
def test_a_lost_item_is_damage(saved, tmp_path, item):
  copy = shutil.copytree(saved, tmp_path / "copy")
  shutil.rmtree(copy / "3" / item)
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.newest() == 2


@pytest.mark.parametrize(
  "text", ["[" * 99_999, "{}", "[[1, 2]]", '{"ema": 3}', '{"\\u0000": ""}', "7"]
)
def test_damaged_digests_and_metrics(saved, tmp_path, text):
  copy = shutil.copytree(saved, tmp_path / "copy")
  (copy / "3" / "digests.json").write_text(text)
  (copy / "2" / "digests.json").unlink()
  (copy / "2" / "metrics" / "metrics").write_text(text)
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.newest() == 2
    assert checkpoints.best() == 1
    assert not checkpoints.is_evaluated(2)


def test_digests_of_files_elsewhere_are_not_read(saved, tmp_path, capsys):
  copy = shutil.copytree(saved, tmp_path / "copy")
  other = tmp_path / "other"
  other.write_bytes(b"")
  digest = hashlib.sha256(b"").hexdigest()
  for name in (str(other), "../../other", "ema/../../../other"):
    (copy / "3" / "digests.json").write_text(json.dumps({name: digest}))
    with Checkpoints(copy) as checkpoints:
      assert checkpoints.newest() == 2
    assert capsys.readouterr().err == (
      f"{copy}: skipping step 3, which is damaged (digests.json names"
      f" {name}): using step 2\n"
    )


def test_a_copy_under_the_name_of_another_step(saved, tmp_path):
  copy = shutil.copytree(saved, tmp_path / "copy")
  shutil.copytree(copy / "2", copy / "5")
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.newest() == 5  # Each of its files is as it was saved.
    with pytest.raises(TrainingError, match=r"/5 holds step 2: remove it$"):
      checkpoints.restore_state(5, state_after(0))


@pytest.mark.parametrize("removals", [4, 5])
def test_a_checkpoint_that_its_run_removes_is_searched_again(
  saved, tmp_path, monkeypatch, removals
):
  copy = shutil.copytree(saved, tmp_path / "copy")
  restore = Checkpoints.restore_weights
  left = [copy / "3"] * removals

  def remove_first(checkpoints, step, like):
    if not left:
      return restore(checkpoints, step, like)
    aside = left.pop().rename(tmp_path / "aside")
    try:
      return restore(checkpoints, step, like)
    finally:
      aside.rename(copy / "3")

  monkeypatch.setattr(Checkpoints, "restore_weights", remove_first)
  model = PureModel(partial(SpatialMamba, ModelConfig(dims=(4,), depths=(1,))))

  def load():
    return load_weights(copy, model, state_after(0).ema)[1]

  if removals == 4:
    assert load()["ema"].params["w"][0] == 3.5
  else:
    with pytest.raises(RemovedError, match="3 was removed while it was"):
      load()
  assert not left


def test_partial_and_foreign_checkpoints_are_skipped(saved, tmp_path, capsys):
  copy = shutil.copytree(saved, tmp_path / "copy")
  shutil.copytree(copy / "3", copy / "4.orbax-checkpoint-tmp")
  shutil.copytree(copy / "3", copy / "1.removed")
  (copy / "notes").mkdir()
  (copy / "7").mkdir()
  (copy / "7" / "model.bin").write_bytes(b"0")
  (copy / "8").write_text("a file")
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.newest() == 3
    checkpoints.set_aside_after(3)
    assert checkpoints.steps() == [1, 2, 3]
  assert capsys.readouterr().err == (
    f"{copy}: skipping step 7, which is not a checkpoint of this project:"
    " using step 3\n"
  )
  assert sorted(x.name for x in copy.iterdir()) == (
    ["1", "2", "3", "7.damaged", "8", "notes"]
  )


def test_without_a_checkpoint_a_line_says_what_to_remove(saved, tmp_path):
  copy = shutil.copytree(saved, tmp_path / "copy")
  for step in (1, 2, 3):
    cut(copy / str(step) / "state" / "manifest.ocdbt")
  with (
    Checkpoints(copy) as checkpoints,
    pytest.raises(TrainingError, match=r"step 3.*step 2.*step 1.*; remove "),
  ):
    checkpoints.newest()
  with pytest.raises(TrainingError, match=r"also has the steps 1, 3$"):
    open_checkpoint(copy / "2").__enter__()


def test_checkpoints_of_earlier_versions_have_no_digests(saved, tmp_path):
  copy = shutil.copytree(saved, tmp_path / "copy")
  (copy / "3" / "digests.json").unlink()
  with Checkpoints(copy) as checkpoints:
    assert checkpoints.newest() == 3
    assert_restored(checkpoints, 3)
    remove(copy / "3" / "state" / "manifest.ocdbt")
    with pytest.raises(TrainingError, match=r"3 is damaged \(.*: remove it"):
      checkpoints.restore_state(3, state_after(0))


def test_damage_without_digests_is_one_line(saved, tmp_path):
  """The command silences Orbax, which logs the damage too."""
  copy = shutil.copytree(saved, tmp_path / "copy")
  remove(copy / "3" / "digests.json")
  empty(copy / "3" / "_CHECKPOINT_METADATA")
  for path in (copy / "3" / "ema").rglob("d/*"):
    flip(path)
  command = (sys.executable, "-m", "spatial_mamba_jax.convert")
  result = subprocess.run(
    (*command, copy / "3", tmp_path / "out"),
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert (result.returncode, result.stdout) == (2, ""), result.stderr
  (line,) = result.stderr.splitlines()
  assert line.startswith(f"convert: {copy / '3'} is damaged (")


def test_a_save_that_fails_costs_nothing_else(tmp_path):
  directory, aside = tmp_path / "checkpoints", tmp_path / "aside"
  with Checkpoints(directory) as checkpoints:
    checkpoints.save(state_after(1), {"seed": 1})
    checkpoints.wait()
    os.rename(directory, aside)
    directory.write_text("in the way")
    with pytest.raises(SaveError, match="step 2 cannot be saved in"):
      save_and_wait(checkpoints, 2)
    directory.unlink()
    os.rename(aside, directory)
    save_and_wait(checkpoints, 3)
    assert checkpoints.steps() == [1, 3]
    assert_restored(checkpoints, checkpoints.newest())


@pytest.mark.parametrize("is_told_by", ["check", "save", "add", "exit"])
def test_a_failure_in_the_background_is_reported(
  tmp_path, monkeypatch, is_told_by
):
  def fail(directory):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(
    "spatial_mamba_jax.training.checkpoint_items.write_digests", fail
  )
  told = pytest.raises(
    SaveError,
    match=r"step 1 cannot be saved in .*: No space left on device; there is",
  )
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state_after(1), {})
  with told:
    match is_told_by:
      case "check":
        while True:  # As a run does after each step.
          checkpoints.check()
      case "save":
        checkpoints.save(state_after(2), {})
      case "add":
        checkpoints.add_evaluation(1, evaluation(0.5))
      case "exit":
        checkpoints.__exit__(None, None, None)
  assert checkpoints.steps() == []
  monkeypatch.undo()
  save_and_wait(checkpoints, 2)
  assert_restored(checkpoints, 2)


@pytest.mark.parametrize("per_process", [False, True])
def test_directories_exist_before_anything_is_written(
  tmp_path, monkeypatch, per_process
):
  """Signals of Orbax say that another process has created its directories."""

  def create_all_async(*_, **__):
    raise AssertionError("directories are created in the background")

  monkeypatch.setattr(atomicity, "create_all_async", create_all_async)
  with Checkpoints(tmp_path, per_process=per_process) as checkpoints:
    checkpoints.save(state_after(3), {}, wait=True)
    assert checkpoints.steps() == [3]


def test_an_evaluation_that_cannot_be_written(saved, tmp_path, monkeypatch):
  def fail(files, step, metrics):
    raise OSError(28, "No space left on device")

  copy = shutil.copytree(saved, tmp_path / "copy")
  monkeypatch.setattr(CheckpointFiles, "add_metrics", fail)
  with Checkpoints(copy) as checkpoints:
    with pytest.raises(
      SaveError,
      match="^the evaluation of step 3 cannot be added to its checkpoint in"
      f" {copy}: No space left on device; the",
    ):
      checkpoints.add_evaluation(3, evaluation(0.9))
    assert_restored(checkpoints, checkpoints.newest())


def test_arrays_larger_than_their_files_are_refused(tmp_path):
  weights = {
    "params": {"head.kernel": np.zeros((4, 3), np.float32)},
    "stats": {},
  }
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(tmp_path / "7" / "ema", args=ocp.args.PyTreeSave(weights))
  path = tmp_path / "7" / "ema" / "params.head.kernel" / ".zarray"
  metadata = json.loads(path.read_text())
  with open_checkpoint(tmp_path) as (checkpoints, step):
    for change, message in (
      ({"shape": [30_000, 30_000]}, "claims to hold arrays of 3600000000"),
      ({"chunks": [30_000, 30_000]}, "claims to hold arrays of 3600000000"),
      ({"dtype": "<c8"}, "of type complex64"),
      ({"dtype": "|S100"}, "is damaged"),
    ):
      path.write_text(json.dumps({**metadata, **change}))
      with pytest.raises(TrainingError, match=message):
        checkpoints.restore_weights(step)
