"""Two processes, each with half of the images, work as one."""

import csv
import json
import resource
import shutil
import signal
import socket
import time

import numpy as np
import pytest

# Seconds in which a run ends after one of its processes has died.
MINUTE = 60


def wait_until(condition, process):
  """Waits until the condition holds; fails if the process ends before."""
  while not condition():
    # One text, because pytest cuts values.
    assert process.poll() is None, "\n".join(process.communicate())
    time.sleep(0.01)


def start_two(experiment, script, *arguments, devices=1):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  return [
    experiment.start(
      script,
      "--distributed",
      *arguments,
      devices=devices,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]


def finish(processes):
  outcomes = [process.communicate(timeout=1800) for process in processes]
  return [process.returncode for process in processes], [
    err for _, err in outcomes
  ]


@pytest.mark.soak
def test_two_processes_train_as_one(experiment, tmp_path):
  """One process, two, two again, and one: the losses of one device.

  Each of the two has two devices, and holds half of the parameters.
  """
  alone, together = tmp_path / "alone", tmp_path / "together"
  arguments = ("--config.model.dims=(64,64)", "--config.length=6 epochs")
  status, _, err = experiment.run("train.py", f"--workdir={alone}", *arguments)
  assert status == 0, err

  arguments += (f"--workdir={together}",)
  process = experiment.start("train.py", *arguments)
  wait_until((together / "checkpoints" / "3").exists, process)
  process.kill()
  process.wait()

  local = tmp_path / "local"

  def start():
    return start_two(
      experiment,
      "train.py",
      *arguments,
      "--config.mesh.fsdp=4",
      "--config.checkpoint_every=2 steps",
      f"--config.local_checkpoint_dir={local}",
      devices=2,
    )

  def is_logged(step):
    return f'"step": {step},' in (together / "metrics.jsonl").read_text()

  # The death of one process ends the other.
  first, second = start()
  wait_until(lambda: is_logged(8), first)
  second.kill()
  _, err = first.communicate(timeout=MINUTE)
  assert first.returncode == 1, err
  assert err.splitlines()[-1] == (
    "train.py: process 1 has ended or hangs: end all processes; the same"
    " commands resume from the last checkpoint"
  )
  # As if the last copies had not reached the working directory.
  for path in (together / "checkpoints").glob("[45678]"):
    shutil.rmtree(path)
  before = [x for x in experiment.records(together) if x["step"] > 6]

  # A signal stops both after the same step.
  processes = start()
  wait_until(lambda: is_logged(12), processes[0])
  after = experiment.records(together)
  for process in processes:
    process.send_signal(signal.SIGTERM)
  statuses, errors = finish(processes)
  assert statuses == [128 + signal.SIGTERM] * 2, errors
  assert "stopped by SIGTERM after step " in errors[1].splitlines()[-1]
  assert f" is restored from {local}" in errors[0]
  assert before
  assert all(record in after for record in before)  # Bit for bit.

  status, _, err = experiment.run("train.py", *arguments)
  assert status == 0, err
  logged, expected = experiment.records(together), experiment.records(alone)
  assert len(logged) == len(expected)
  for record, wanted in zip(logged, expected, strict=True):
    assert record.pop("kind") == wanted.pop("kind")
    if "ece" in wanted:  # A difference of shares.
      assert record.pop("ece") == pytest.approx(wanted.pop("ece"), abs=5e-4)
    assert record == pytest.approx(wanted, rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("index", [0, 1])
def test_a_save_that_fails_in_one_process_ends_both(
  experiment, tmp_path, index
):
  """One process may write no file of more than 8 kB."""
  processes = start_two(
    experiment,
    "train.py",
    f"--workdir={tmp_path}",
    *("--config.model.dims=(64,64)", "--config.mesh.fsdp=4"),
    devices=2,
  )
  resource.prlimit(processes[index].pid, resource.RLIMIT_FSIZE, (8192, 8192))
  statuses, errors = finish(processes)
  assert statuses == [1, 1], errors
  one, other = (err.splitlines()[-1] for err in errors)
  assert one == other
  assert one.startswith("train.py: the checkpoint of step 3 cannot be saved in")
  assert "File too large" in one


def read(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.soak
def test_two_processes_evaluate_as_one(experiment, image_tree, tmp_path):
  """Three batches of four for ten images, of which one cannot be read.

  In the last batch, the padding of one process lies before the other's image.
  """
  tree = shutil.copytree(image_tree, tmp_path / "tree")
  last = max((tree / "val").glob("*/*"))
  shutil.copy(last, last.with_name("z.JPEG"))
  arguments = (
    f"--workdir={tmp_path / 'run'}",
    "--config.data.name=image_folder",
    f"--config.data.data_dir={tree}",
    "--config.data.max_unreadable_share=0.2",
    "--config.evaluation_batch_size=4",
  )
  status, _, err = experiment.run(
    "train.py", *arguments, "--config.length=2 epochs"
  )
  assert status == 0, err
  images = sorted((tree / "val").glob("*/*"))
  images[4].write_bytes(b"")
  alone, together = tmp_path / "alone", tmp_path / "together"
  status, text, err = experiment.run(
    "eval.py", *arguments, "--json", f"--output_dir={alone}"
  )
  assert status == 0, err
  processes = start_two(
    experiment, "eval.py", *arguments, "--json", f"--output_dir={together}"
  )
  outcomes = [process.communicate(timeout=1800) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outcomes
  # One process prints for both; the other lines are XLA's.
  (line,) = [
    line
    for out, _ in outcomes
    for line in out.splitlines()
    if not line.startswith("[Gloo]")
  ]
  expected, evaluations = json.loads(text), json.loads(line)
  for name in ("ema", "raw"):
    evaluation = evaluations[name]
    assert evaluation == pytest.approx(expected[name], rel=1e-4)
    assert (evaluation["images"], evaluation["unreadable"]) == (9, 1)
    rows = read(together / name / "predictions.csv")
    assert [row["image"] for row in rows] == list(map(str, images))
    for row, wanted in zip(
      rows, read(alone / name / "predictions.csv"), strict=True
    ):
      for column, value in row.items():
        if column.startswith("probability") and value:
          value, expect = float(value), float(wanted[column])
          assert value == pytest.approx(expect, rel=1e-4)
        else:
          assert value == wanted[column]
    assert rows.pop(4)["status"] == "unreadable"
    hits = [row["label"] == row["predicted_1"] for row in rows]
    assert evaluation["top1"] == np.mean(hits)
    classes = read(together / name / "per_class.csv")
    assert [int(row["images"]) for row in classes] == [3, 2, 4]
    assert (together / name / "confusion.png").stat().st_size


def test_no_cluster_is_one_line(experiment, tmp_path):
  status, _, err = experiment.run(
    "train.py", f"--workdir={tmp_path}", "--distributed"
  )
  assert status == 2
  (line,) = err.splitlines()
  assert "set JAX_COORDINATOR_ADDRESS" in line
