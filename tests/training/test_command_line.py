"""Mistakes end in one line that says what to do; eval.py prints its line."""

import json
import re

import pytest


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.batch_sise=8"], "batch_sise"),
    (["--config.epochs=many"], "epochs"),
    (["--config.batch_size=0"], "config.batch_size must be at least 1, got 0"),
    (["--config.seed=-1"], "config.seed must be in"),
    (
      ["--config.optimizer.warmup_epochs=9"],
      "config.optimizer.warmup_epochs must be at least 0 and below epochs=8",
    ),
    (["--config.model.name=vit"], "config.model: no model is named 'vit'"),
    (["--config.model.num_classes=5"], "set --config.model.num_classes=3"),
    (["--config.data.name=mnist"], "data.name must be one of"),
    (["--config.data.name=image_folder", "--config.data.data_dir=no"], "no"),
    (["--config.batch_size=32"], "larger than the 24 training images"),
    (["--config=no/such/file.py"], "no/such/file.py"),
    (["extra"], "'extra' is no flag"),
    (["--workdir="], "--workdir=DIR is needed"),
  ],
)
def test_a_mistake_is_one_line(experiment, tmp_path, arguments, message):
  status, out, err = experiment.run(
    "train.py", f"--workdir={tmp_path / 'run'}", *arguments
  )
  assert status == 2, err
  assert "Traceback" not in err
  *before, last = err.splitlines()
  assert last.startswith("train.py: ")
  assert message in last
  assert not out
  assert not before
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_divergence_stops_and_keeps_the_last_good_checkpoint(
  experiment, tmp_path
):
  workdir = tmp_path / "run"
  # A step of 1e30 leaves weights whose loss is not a number.
  status, _, err = experiment.run(
    "train.py",
    f"--workdir={workdir}",
    "--config.optimizer.learning_rate=1e38",
    "--config.optimizer.warmup_epochs=2",
  )
  assert status == 1
  last = err.splitlines()[-1]
  step = int(re.search(r"of step (\d+) is not finite", last)[1])
  kept = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")]
  assert all(checkpoint < step for checkpoint in kept)


def test_evaluation(experiment, tmp_path):
  workdir = tmp_path / "run"
  flag = f"--workdir={workdir}"
  status, _, err = experiment.run("eval.py", flag)
  assert status == 2
  assert "does not exist: train first" in err.splitlines()[-1]
  status, _, err = experiment.run("train.py", flag, "--config.epochs=3")
  assert status == 0, err
  status, out, err = experiment.run("eval.py", flag)
  assert status == 0, err
  assert re.fullmatch(
    r"top-1 \d+\.\d\d%  top-5 100\.00%  loss \d+\.\d{4}  images 24\n", out
  )
  # Four devices evaluate what one device has trained.
  status, text, err = experiment.run(
    "eval.py",
    f"--checkpoint={workdir / 'checkpoints' / '9'}",
    "--json",
    XLA_FLAGS="--xla_force_host_platform_device_count=4",
  )
  assert status == 0, err
  (line,) = text.splitlines()
  logged = experiment.records(workdir)[-1]
  evaluation = json.loads(line)
  assert evaluation["images"] == 24
  assert evaluation["loss"] == pytest.approx(logged["loss"], rel=1e-5)
  assert evaluation["top1"] == logged["top1"]
  status, _, err = experiment.run("eval.py", flag, "--config.model.d_state=2")
  assert status == 2
  assert "another model than config.model asks for" in err.splitlines()[-1]
