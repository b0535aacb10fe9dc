"""Two processes, each with a device and half the images, work as one."""

import csv
import json
import shutil
import signal
import socket

import numpy as np
import pytest

# Without augmentation, two processes see the same images as one.
PLAIN = (
  "--config.model.drop_path_rate=0",
  "--config.data.crop_scale=(1.0,1.0)",
  "--config.data.crop_ratio=(1.0,1.0)",
  "--config.data.flip_probability=0",
  "--config.data.randaugment_operations=0",
  "--config.task.erasing_probability=0",
  "--config.task.mixing.probability=0",
)


def start_two(experiment, script, *arguments):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  return [
    experiment.start(
      script,
      "--distributed",
      *arguments,
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


def test_two_processes_train_as_one(experiment, tmp_path):
  alone, together = tmp_path / "alone", tmp_path / "together"
  status, _, err = experiment.run(
    "train.py",
    f"--workdir={alone}",
    *PLAIN,
    devices=2,
  )
  assert status == 0, err
  arguments = ("train.py", f"--workdir={together}", *PLAIN)
  processes = start_two(experiment, *arguments)
  for line in processes[0].stderr:
    if line.startswith("step 4/"):
      break
  for process in processes:
    process.send_signal(signal.SIGTERM)
  statuses, errors = finish(processes)
  assert statuses == [128 + signal.SIGTERM] * 2, errors
  assert "stopped by SIGTERM after step " in errors[1].splitlines()[-1]
  statuses, errors = finish(start_two(experiment, *arguments))
  assert statuses == [0, 0], errors
  logged = experiment.records(together)
  expected = experiment.records(alone)
  assert len(logged) == len(expected)
  for record, wanted in zip(logged, expected, strict=True):
    assert record.keys() == wanted.keys()
    assert record["step"] == wanted["step"]
    for name in ("loss", "accuracy", "top1", "images", "grad_norm"):
      if name in wanted:
        np.testing.assert_allclose(record[name], wanted[name], rtol=1e-3)


def read(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


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
