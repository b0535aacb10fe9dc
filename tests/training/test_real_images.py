"""The scripts on image files: ImageNet and a folder."""

import re
import runpy
import shutil
import time

import pytest

from spatial_mamba_jax.data.prepare_imagenet import main as prepare_imagenet
from spatial_mamba_jax.training.experiment import to_dict

IMAGENET = ("imagenet_tiny", "imagenet_small", "imagenet_base")
# Replaces the model by two stages of four channels.
IMAGENET_CONFIG = """
import runpy


def get_config():
  config = runpy.run_path("configs/NAME.py")["get_config"]()
  config.model.dims, config.model.depths = (4, 4), (1, 2)
  return config
"""
NUMBERS = (
  r"  top-1 \d+\.\d\d%  top-5 100\.00%  loss \d+\.\d{4}  ECE \d+\.\d\d%"
  r"  images 9\n"
)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenet_configs_are_valid(name):
  config = runpy.run_path(f"configs/{name}.py")["get_config"]()
  config.validate()
  assert config.model.name == name.replace("imagenet", "spatial_mamba")


@pytest.fixture(scope="module")
def imagenet(image_tree, tmp_path_factory):
  """A directory with a small tree prepared as TFDS's imagenet2012."""
  data_dir = tmp_path_factory.mktemp("tfds")
  prepare_imagenet([f"--image_folder={image_tree}", f"--data_dir={data_dir}"])
  return data_dir


def test_preparation_prints_its_directory(image_tree, tmp_path, capsys):
  prepare_imagenet([f"--image_folder={image_tree}", f"--data_dir={tmp_path}"])
  assert f"prepared {tmp_path}" in capsys.readouterr().out


def test_the_imagenet_configs_differ_by_model_alone():
  """Therefore the tests train one of them."""

  def rest(name):
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    # All use drop path and MESA, at different rates.
    assert config.model.drop_path_rate > 0
    assert config.mesa_weight > 0
    config.model.name = "spatial_mamba_tiny"
    config.model.drop_path_rate = config.mesa_weight = 0.1
    return to_dict(config)

  first, *others = map(rest, IMAGENET)
  assert others == [first, first]


@pytest.mark.soak
def test_an_imagenet_config_trains_two_steps(experiment, imagenet, tmp_path):
  """With the whole recipe on, MESA from the first step."""
  experiment.path.write_text(IMAGENET_CONFIG.replace("NAME", IMAGENET[0]))
  workdir = tmp_path / "run"
  status, _, err = experiment.run(
    "train.py",
    f"--workdir={workdir}",
    f"--config.data.data_dir={imagenet}",
    "--config.data.image_size=32",
    "--config.data.num_workers=2",
    "--config.task.num_classes=3",
    "--config.optimizer.warmup=0 epochs",
    "--config.batch_size=6",
    "--config.evaluation_batch_size=6",
    "--config.length=1 epoch",
    "--config.mesa_start=0",
    "--config.log_every=1 step",
  )
  assert status == 0, err
  logged = experiment.records(workdir)
  assert [r["step"] for r in logged if r["kind"] == "train"] == [1, 2]


@pytest.mark.soak
def test_a_folder_of_images_trains_and_evaluates(
  experiment, image_tree, tmp_path
):
  arguments = (
    f"--workdir={tmp_path / 'run'}",
    "--config.data.name=image_folder",
    f"--config.data.data_dir={image_tree}",
    "--config.length=2 epochs",
  )
  status, _, err = experiment.run("train.py", *arguments)
  assert status == 0, err
  status, out, err = experiment.run("eval.py", *arguments)
  assert status == 0, err
  step = r"step (\d+): "
  assert re.fullmatch(f"{step}ema{NUMBERS}{step}raw{NUMBERS}", out)


@pytest.mark.soak
def test_a_data_directory_that_vanishes_costs_nothing(
  experiment, image_tree, tmp_path
):
  """As a network disk that is unmounted while the run goes on."""
  whole, stopped = tmp_path / "whole", tmp_path / "stopped"
  data = shutil.copytree(image_tree, tmp_path / "data")
  arguments = (
    "--config.data.name=image_folder",
    f"--config.data.data_dir={data}",
    "--config.length=8 epochs",
  )
  status, _, err = experiment.run("train.py", f"--workdir={whole}", *arguments)
  assert status == 0, err

  arguments += (f"--workdir={stopped}",)
  process = experiment.start("train.py", *arguments)
  while not (stopped / "checkpoints" / "1").exists():
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  data.rename(tmp_path / "unmounted")
  _, err = process.communicate()
  assert process.returncode == 2, err
  assert "Traceback" not in err
  last = err.splitlines()[-1]
  assert last.startswith("train.py: "), err
  assert str(data) in last
  status, _, err = experiment.run("train.py", *arguments)
  assert status == 2
  (line,) = err.splitlines()
  assert str(data) in line

  (tmp_path / "unmounted").rename(data)
  status, _, err = experiment.run("train.py", *arguments)
  assert status == 0, err
  assert experiment.records(stopped) == experiment.records(whole)
