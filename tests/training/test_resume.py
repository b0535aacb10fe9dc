"""A run that is killed and restarted is the run that was left alone."""

import json
import signal
import time

import numpy as np
import pytest


@pytest.fixture(scope="module")
def whole(make_experiment, tmp_path_factory):
  """The uninterrupted run: its records and its last arrays."""
  directory = tmp_path_factory.mktemp("whole")
  experiment = make_experiment(directory)
  workdir = directory / "run"
  finish(experiment, workdir)
  return experiment.records(workdir), experiment.final_arrays(workdir)


def finish(experiment, workdir):
  status, _, err = experiment.run("train.py", f"--workdir={workdir}")
  assert status == 0, err


def assert_same_run(experiment, workdir, whole):
  logged, arrays = whole
  assert experiment.records(workdir) == logged
  resumed = experiment.final_arrays(workdir)
  assert resumed.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(resumed[name], array, err_msg=name)


def wait_for(condition, process):
  """Waits until the condition holds or the process has ended."""
  until = time.monotonic() + 240
  while process.poll() is None and not condition():
    assert time.monotonic() < until
    time.sleep(0.001)


def test_killed_at_many_moments(experiment, tmp_path, whole):
  """After a logged step, while a checkpoint is being saved, and after one."""
  workdir = tmp_path / "run"
  log = workdir / "metrics.jsonl"
  checkpoints = workdir / "checkpoints"

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

  for condition in (
    lambda: logged(2),
    lambda: is_saving(3),
    lambda: is_saved(9),
    lambda: logged(14),
  ):
    process = experiment.start("train.py", f"--workdir={workdir}")
    wait_for(condition, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  # What SIGKILL can leave behind in the log: half a line.
  with log.open("a") as file:
    file.write('{"step": 1')
  finish(experiment, workdir)
  assert_same_run(experiment, workdir, whole)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(experiment, tmp_path, whole, stop):
  workdir = tmp_path / "run"
  process = experiment.start("train.py", f"--workdir={workdir}")
  log = workdir / "metrics.jsonl"
  wait_for(lambda: log.exists() and '"step": 4,' in log.read_text(), process)
  process.send_signal(stop)
  _, err = process.communicate()
  assert process.returncode == 128 + stop
  last = err.splitlines()[-1]
  assert last.startswith(f"train.py: stopped by {stop.name} after step ")
  step = last.split("after step ")[1].split(",")[0]
  assert (workdir / "checkpoints" / step).is_dir()
  finish(experiment, workdir)
  assert_same_run(experiment, workdir, whole)


def test_a_contradicting_config_is_refused(experiment, tmp_path):
  workdir = tmp_path / "run"
  arguments = (f"--workdir={workdir}", "--config.epochs=2")
  status, _, err = experiment.run("train.py", *arguments)
  assert status == 0, err
  description = json.loads((workdir / "run.json").read_text())
  assert description["config"]["epochs"] == 2
  assert description["epoch_steps"] == 3
  assert {"jax", "flax", "orbax-checkpoint"} <= description["versions"].keys()
  before = experiment.records(workdir)
  status, _, err = experiment.run(
    "train.py", *arguments, "--config.seed=1", "--config.log_every=1"
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
    "train.py", *arguments, "--config.log_every=1"
  )
  assert status == 0
  assert "all 6 steps are done already" in out
  assert experiment.records(workdir) == before
