"""Mistakes end in one line that says what to do; eval.py prints its line."""

import json
import re
import resource

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
    (
      ["--workdir=gs://bucket/run"],
      "a directory of this machine, got gs://bucket/run",
    ),
    (["--workdir=train.py/run"], "cannot write to"),
    (["--config.checkpoint_every=5 days"], '"500 steps", "10 minutes"'),
    (["--config.data.test_crop_ratio=1.2"], "test_crop_ratio must be within"),
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
  numbers = (
    r"  top-1 \d+\.\d\d%  top-5 100\.00%  loss \d+\.\d{4}  ECE \d+\.\d\d%"
    r"  images 24\n"
  )
  assert re.fullmatch(f"ema{numbers}raw{numbers}", out)
  # Four devices evaluate what one device has trained.
  status, text, err = experiment.run(
    "eval.py",
    f"--checkpoint={workdir / 'checkpoints' / '9'}",
    "--json",
    devices=4,
  )
  assert status == 0, err
  (line,) = text.splitlines()
  logged = experiment.records(workdir)[-2:]
  assert [r["kind"] for r in logged] == ["evaluation", "evaluation_raw"]
  evaluations = json.loads(line)
  assert evaluations["ema"]["loss"] != evaluations["raw"]["loss"]
  for name, record in zip(("ema", "raw"), logged, strict=True):
    evaluation = evaluations[name]
    assert record.keys() == {"step", "kind"} | evaluation.keys()
    assert evaluation["images"] == 24
    assert evaluation["loss"] == pytest.approx(record["loss"], rel=1e-5)
    assert evaluation["ece"] == pytest.approx(record["ece"], rel=1e-4)
    assert evaluation["top1"] == record["top1"]
  status, _, err = experiment.run("eval.py", flag, "--config.model.d_state=2")
  assert status == 2
  assert "another model than config.model asks for" in err.splitlines()[-1]


def test_evaluation_at_another_resolution_and_crop(experiment, tmp_path):
  flag = f"--workdir={tmp_path / 'run'}"
  status, _, err = experiment.run("train.py", flag, "--config.epochs=2")
  assert status == 0, err

  def evaluate(*arguments):
    status, out, err = experiment.run("eval.py", flag, "--json", *arguments)
    assert status == 0, err
    return out

  test_time = evaluate("--resolution=20", "--crop_ratio=0.5")
  assert test_time == evaluate(
    "--config.data.image_size=20", "--config.data.test_crop_ratio=0.5"
  )
  in_the_way = tmp_path / "file"
  in_the_way.write_text("")
  for argument, message in (
    ("--resolution=0", "--resolution=0"),
    ("--crop_ratio=0", "data.test_crop_ratio must be within (0, 1], got 0.0"),
    (f"--output_dir={in_the_way}", f"cannot write to {in_the_way}"),
  ):
    status, out, err = experiment.run("eval.py", flag, argument)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert message in line


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(experiment, tmp_path):
  """A limit of file sizes stands for it: saves fail, and the log does not."""
  workdir = tmp_path / "run"
  flag = f"--workdir={workdir}"
  status, _, err = experiment.run("train.py", flag, "--config.epochs=2")
  assert status == 0, err
  (workdir / "checkpoints" / "6").rename(tmp_path / "6")
  process = experiment.start(
    "train.py",
    flag,
    "--config.epochs=2",
    JAX_ENABLE_COMPILATION_CACHE="false",
  )
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))
  _, err = process.communicate()
  assert process.returncode == 1, err
  told = [line for line in err.splitlines() if not line.startswith("step ")]
  assert told == [
    f"resuming {workdir} after step 3",
    f"train.py: the checkpoint of step 6 cannot be saved in"
    f" {workdir / 'checkpoints'}: File too large; the newest there is of step"
    " 3; once it can be written, the same command resumes",
  ]
  status, _, err = experiment.run("train.py", flag, "--config.epochs=2")
  assert status == 0, err
  assert err.startswith(f"resuming {workdir} after step 3\n")
