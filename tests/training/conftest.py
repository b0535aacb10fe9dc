"""Small experiments, in this process and in others."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Two stages of four channels, which compile in seconds; no test needs a larger
# model.
EXPERIMENT = """
from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.tasks.classification import ClassificationConfig
from spatial_mamba_jax.training.config import ModelSection, TrainConfig
from spatial_mamba_jax.training.config import OptimizerConfig


def get_config():
  return TrainConfig(
    task=ClassificationConfig(num_classes=3),
    model=ModelSection(dims=(4, 4), depths=(1, 2), drop_path_rate=0.2),
    data=DataConfig(
      name="synthetic", image_size=16, synthetic_images=24, synthetic_classes=3
    ),
    optimizer=OptimizerConfig(reference_batch_size=8, warmup="1 epoch"),
    batch_size=8,
    length="8 epochs",
    ema_decay=0.9,
    evaluation_batch_size=8,
    log_every="2 steps",
  )
"""


# Logged values that differ from run to run.
SPEEDS = ("images_per_second", "data_wait", "model_flops_per_second", "mfu")
# Seconds before a process counts as hung, even on a busy machine.
PATIENCE = 1800


class Experiment:
  """Runs of the scripts with one small config."""

  def __init__(self, directory, cache):
    self._started = []
    self.path = directory / "experiment.py"
    self.path.write_text(EXPERIMENT)
    self._environment = {
      **os.environ,
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }

  def start(self, script, *arguments, devices=1, **environment):
    flags = os.environ.get("XLA_FLAGS", "")
    several = f"--xla_force_host_platform_device_count={devices}"
    environment["XLA_FLAGS"] = f"{flags} {several}"
    process = subprocess.Popen(
      (sys.executable, script, f"--config={self.path}", *arguments),
      cwd=ROOT,
      env={**self._environment, **environment},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      process_group=0,  # A group of its own, which tests can signal.
    )
    self._started.append(process)
    return process

  def end(self):
    """Ends processes that a failed test has left."""
    for process in self._started:
      with process:
        process.kill()

  def run(self, script, *arguments, **options):
    """Runs a script; returns (status, standard output, standard error)."""
    process = self.start(script, *arguments, **options)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err

  @staticmethod
  def records(workdir):
    """Returns the records of a run without their speeds."""
    records = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
      record = json.loads(line)
      for of_time in SPEEDS:
        record.pop(of_time, None)
      records.append(record)
    return records

  @staticmethod
  def final_arrays(workdir):
    """Returns {name: array} of the newest checkpoint."""
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
      items = manager.restore(
        manager.latest_step(),
        args=ocp.args.Composite(
          ema=ocp.args.StandardRestore(), state=ocp.args.StandardRestore()
        ),
      )
    flat = jax.tree_util.tree_flatten_with_path(dict(items))[0]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


@pytest.fixture(scope="session")
def make_experiment(tmp_path_factory):
  """Makes an experiment in a directory; all share what they compile."""
  cache = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    cache = cache.parent  # Workers share compiled programs.
  cache /= "compiled"
  made = []

  def make(directory):
    made.append(Experiment(directory, cache))
    return made[-1]

  yield make
  for experiment in made:
    experiment.end()


@pytest.fixture
def experiment(make_experiment, tmp_path):
  experiment = make_experiment(tmp_path)
  yield experiment
  experiment.end()
