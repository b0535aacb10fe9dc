"""Forecasts by the real compilers, of small networks."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_docs import ROOT

pytestmark = pytest.mark.aot


def run(topology, *arguments):
  """Returns (status, standard output, last line of standard error)."""
  process = subprocess.run(
    (
      *(sys.executable, "-m", "spatial_mamba_jax.forecast"),
      *("--config=tests/pixel_task.py", f"--topology={topology}"),
      *("--config.batch_size=16", "--config.evaluation_batch_size=16"),
      "--config.accumulation_steps=1",
      "--images_per_core=1e12",
      *arguments,
    ),
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    capture_output=True,
    text=True,
  )
  return process.returncode, process.stdout, process.stderr.splitlines()[-1:]


@pytest.mark.parametrize("topology", ["v5e:2x2", "h200:8"])
def test_another_task_is_forecast_and_saved(topology, tmp_path):
  file = tmp_path / "step.bin"
  status, out, error = run(topology, "--json", f"--save={file}")
  assert status == 0, error
  (found,) = json.loads(out)
  assert found["memory"]["parameters"] * 2 == pytest.approx(
    found["memory"]["moments"], rel=0.05
  )
  assert found["after"]["flops"] > 0
  assert found["collectives"]["all-reduce"][0] > 0
  assert found["step_seconds"]["after"]["total"] > 0
  assert file.stat().st_size > 2**16


def test_two_slices_lie_along_replica():
  status, out, error = run("2xv5e:2x2", "--config.mesh.replica=2", "--json")
  assert status == 0, error
  (found,) = json.loads(out)
  assert found["mesh"] == {"replica": 2, "data": 4, "fsdp": 1}
  assert found["after"]["network"] > 0
  status, _, (line,) = run("2xv5e:2x2", "--config.mesh.replica=1")
  assert status == 2
  assert "config.mesh.replica=1 must be a multiple of the 2 slices" in line


def test_a_batch_that_does_not_divide_is_refused():
  status, _, (line,) = run("v5e:4x8")
  assert status == 2
  assert "= 16 must be a multiple of the 32 devices" in line


def test_several_machines_make_a_table_and_a_plot(tmp_path):
  plot = tmp_path / "cost.png"
  status, out, error = run("v5e:4x4,v5e:2x2", f"--plot={plot}")
  assert status == 0, error
  _, _, first, second, *_ = out.splitlines()
  assert first.startswith("| v5e:2x2 | 4 |")
  assert second.startswith("| v5e:4x4 | 16 |")
  assert plot.read_bytes().startswith(b"\x89PNG")
