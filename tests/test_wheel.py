"""What a user of the wheel has, who has no checkout."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  directory = tmp_path_factory.mktemp("wheel")
  command = (sys.executable, "-m", "hatchling", "build", "-t", "wheel")
  subprocess.run(
    (*command, "-d", str(directory)),
    cwd=ROOT,
    check=True,
    capture_output=True,
    timeout=300,
  )
  (path,) = directory.glob("*.whl")
  return path


def test_a_wheel_trains_and_evaluates(wheel, tmp_path):
  assert wheel.stat().st_size < 2**20
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "site")
  assert sorted(x.name for x in (tmp_path / "site").iterdir())[:2] == [
    "spatial_mamba_jax",
    f"spatial_mamba_jax-{wheel.name.split('-')[1]}.dist-info",
  ]
  program = (
    "import spatial_mamba_jax.training.config_file as x;"
    " print(x.__file__);"
    " print(x.load_config('configs/digits_mixers.py:ss2d').model.mixer.name)"
  )
  outputs = [
    subprocess.run(
      (sys.executable, *arguments),
      cwd=tmp_path,
      env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
      check=True,
      capture_output=True,
      text=True,
      timeout=300,
    ).stdout
    for arguments in (
      ("-c", program),
      ("-m", "spatial_mamba_jax.train", "--help"),
      ("-m", "spatial_mamba_jax.eval", "--help"),
    )
  ]
  file, mixer = outputs[0].splitlines()
  assert file.startswith(str(tmp_path / "site"))
  assert mixer == "ss2d"
  assert "--profile_steps" in outputs[1]
  assert "--resolution" in outputs[2]
