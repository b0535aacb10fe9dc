"""A run that is killed and restarted equals an uninterrupted run."""

import json
import os
import signal
import time

import numpy as np
import pytest

from spatial_mamba_jax.training.goodput import read_goodput
from spatial_mamba_jax.training.workdir import WorkdirLock


@pytest.fixture(scope="module")
def whole(make_experiment, tmp_path_factory):
  """Runs without interruption; returns records and final arrays."""
  directory = tmp_path_factory.mktemp("whole")
  experiment = make_experiment(directory)
  workdir = directory / "run"
  finish(experiment, workdir)
  return experiment.records(workdir), experiment.final_arrays(workdir)


def finish(experiment, workdir):
  outcome = experiment.run("train.py", f"--workdir={workdir}")
  assert outcome[0] == 0, outcome
  return outcome


def assert_same_run(experiment, workdir, whole):
  logged, arrays = whole
  assert experiment.records(workdir) == logged
  resumed = experiment.final_arrays(workdir)
  assert resumed.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def wait_for(condition, process):
  """Waits until the condition holds or the process has ended."""
  until = time.monotonic() + 1800  # Only a hang takes longer.
  while process.poll() is None and not condition():
    assert time.monotonic() < until
    time.sleep(0.001)


@pytest.mark.soak
def test_interrupted_at_many_moments(experiment, tmp_path, whole):
  """Kills after a logged step, during a save, after it, and in an evaluation.

  Between these, signals stop the run, which saves first.
  """
  workdir = tmp_path / "run"
  log, ledger = workdir / "metrics.jsonl", workdir / "goodput.jsonl"
  checkpoints = workdir / "checkpoints"
  started = time.time()

  def logged(step):
    return (
      log.exists() and f'"step": {step}, "kind": "train"' in log.read_text()
    )

  def is_saving(after):
    return any(
      "tmp" in path.name and int(path.name.split(".")[0]) > after
      for path in checkpoints.glob("*")
    )

  def is_saved(step):
    return (checkpoints / str(step)).exists()

  for condition, stop in (
    (ledger.exists, signal.SIGTERM),  # Before it compiles, or while.
    (lambda: logged(2), signal.SIGKILL),
    (lambda: is_saving(3), signal.SIGKILL),
    (lambda: logged(6), signal.SIGINT),
    (lambda: is_saved(9), signal.SIGKILL),  # Before it is logged and evaluated.
    (lambda: logged(12), signal.SIGTERM),  # While it is evaluated.
    (lambda: logged(14), signal.SIGHUP),
    (lambda: is_saving(15), signal.SIGTERM),
    (lambda: is_saved(21), signal.SIGKILL),
  ):
    # A terminal signals the process group, and so the workers, too.
    workers = 2 if stop == signal.SIGHUP else 0
    process = experiment.start(
      "train.py", f"--workdir={workdir}", f"--config.data.num_workers={workers}"
    )
    wait_for(condition, process)
    os.killpg(process.pid, stop)
    _, err = process.communicate()
    if stop == signal.SIGKILL:
      assert process.returncode == -signal.SIGKILL
    else:
      assert_saved_first(process.returncode, err, stop, workdir)
  assert is_saved(21)
  # SIGKILL can leave half a line in the log. A disk can leave a block of zeros,
  # and a checkpoint with a truncated file.
  with log.open("a") as file:
    file.write("\0\0\0\n" + '{"step": 1')
  (checkpoints / "21" / "state" / "manifest.ocdbt").write_bytes(b"")
  _, _, err = finish(experiment, workdir)
  elapsed = time.time() - started
  first, second, *_ = err.splitlines()
  assert first.startswith(f"{checkpoints}: skipping step 21, which is")
  assert second.endswith(f"1 damaged lines were moved to {log}.damaged")
  assert_same_run(experiment, workdir, whole)
  # The ledger has all ten processes, and the time between them.
  goodput = read_goodput(workdir)
  assert goodput.starts == 10
  assert goodput.wall == pytest.approx(elapsed, rel=0.2)
  assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall, rel=0.01)
  parts = ("steps", "start", "compile", "restore", "evaluation", "save", "down")
  assert all(goodput.seconds[part] > 0 for part in parts), goodput
  assert err.splitlines()[-1].startswith("goodput ")
  assert {21, 24} <= {save.step for save in goodput.saves}


def assert_saved_first(status, err, stop, workdir):
  assert status == 128 + stop, err
  assert "Traceback" not in err
  assert err.count("stopped by") == 1
  last = err.splitlines()[-1]
  assert last.startswith(f"train.py: stopped by {stop.name}")
  log = workdir / "metrics.jsonl"
  if "after step" not in last:  # There was nothing to save.
    assert not log.exists() or not log.read_text()
    return
  step = last.split("after step ")[1].split(",")[0]
  assert (workdir / "checkpoints" / step).is_dir()


@pytest.mark.soak
def test_checkpoints_between_evaluations(experiment, tmp_path, whole):
  """One is saved after four steps, and one after each epoch of three."""
  workdir = tmp_path / "run"
  flags = (f"--workdir={workdir}", "--config.evaluate_every=8 epochs")
  process = experiment.start(
    "train.py", *flags, "--config.checkpoint_every=4 steps"
  )
  wait_for((workdir / "checkpoints" / "12").exists, process)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  # A second run must not write into the directory.
  with WorkdirLock(workdir):
    status, _, err = experiment.run("train.py", *flags)
  assert status == 2
  (line,) = err.splitlines()
  assert f"{workdir} is in use by the run of " in line
  # JAX's strict modes must not matter.
  status, _, err = experiment.run(
    "train.py",
    *flags,
    "--profile_steps=18:19",
    JAX_TRANSFER_GUARD="disallow",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
  )
  assert status == 0, err
  resumed_after = int(err.splitlines()[0].split("after step ")[1])
  assert resumed_after >= 12
  assert resumed_after % 4 == 0
  assert len(list(workdir.rglob("plugins/profile/*/*.xplane.pb"))) == 1
  records = experiment.records(workdir)
  assert [r for r in records if r["kind"] == "train"] == [
    r for r in whole[0] if r["kind"] == "train"
  ]
  assert records[-2:] == whole[0][-2:]


@pytest.mark.soak
def test_a_contradicting_config_is_refused(experiment, tmp_path):
  workdir = tmp_path / "run"
  arguments = (f"--workdir={workdir}", "--config.length=2 epochs")
  status, _, err = experiment.run("train.py", *arguments)
  assert status == 0, err
  description = json.loads((workdir / "run.json").read_text())
  assert description["config"]["length"] == "2 epochs"
  assert description["config"]["task"]["kind"] == "classification"
  assert description["steps"] == 6
  assert description["epoch_steps"] == 3
  assert {"jax", "flax", "orbax-checkpoint"} <= description["versions"].keys()
  before = experiment.records(workdir)
  status, _, err = experiment.run(
    "train.py", *arguments, "--config.seed=1", "--config.log_every=1 step"
  )
  assert status == 2
  assert err.splitlines()[-1] == (
    f"train.py: {workdir} holds another experiment: seed was 0 and is 1;"
    " choose another workdir, or the old values"
  )
  status, _, err = experiment.run(
    "train.py", *arguments, "--config.data.synthetic_images=25"
  )
  assert status == 2
  assert "training_images was 24 and is 25" in err.splitlines()[-1]
  status, out, _ = experiment.run(
    "train.py", *arguments, "--config.log_every=1 step"
  )
  assert status == 0
  assert "all 6 steps are already done" in out
  assert experiment.records(workdir) == before
