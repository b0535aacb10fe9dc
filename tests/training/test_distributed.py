"""Two processes, each with a device and half the images, train as one."""

import signal
import socket

import numpy as np

# Without randomness of its own, the two see the images that one would.
PLAIN = (
  "--config.model.drop_path_rate=0",
  "--config.data.crop_scale=(1.0,1.0)",
  "--config.data.crop_ratio=(1.0,1.0)",
  "--config.data.flip_probability=0",
)


def start_two(experiment, workdir):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  return [
    experiment.start(
      "train.py",
      f"--workdir={workdir}",
      "--distributed",
      *PLAIN,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES="2",
      JAX_PROCESS_ID=str(index),
    )
    for index in range(2)
  ]


def finish(processes):
  outcomes = [process.communicate(timeout=300) for process in processes]
  return [process.returncode for process in processes], [
    err for _, err in outcomes
  ]


def test_two_processes_train_as_one(experiment, tmp_path):
  alone, together = tmp_path / "alone", tmp_path / "together"
  status, _, err = experiment.run(
    "train.py",
    f"--workdir={alone}",
    *PLAIN,
    XLA_FLAGS="--xla_force_host_platform_device_count=2",
  )
  assert status == 0, err
  processes = start_two(experiment, together)
  for line in processes[0].stderr:
    if line.startswith("step 4/"):
      break
  for process in processes:
    process.send_signal(signal.SIGTERM)
  statuses, errors = finish(processes)
  assert statuses == [128 + signal.SIGTERM] * 2, errors
  assert "stopped by SIGTERM after step " in errors[1].splitlines()[-1]
  statuses, errors = finish(start_two(experiment, together))
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


def test_no_cluster_is_one_line(experiment, tmp_path):
  status, _, err = experiment.run(
    "train.py", f"--workdir={tmp_path}", "--distributed"
  )
  assert status == 2
  (line,) = err.splitlines()
  assert "set JAX_COORDINATOR_ADDRESS" in line
