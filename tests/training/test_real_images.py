"""The scripts on files as users have them: ImageNet's, and a folder's."""

import re
import runpy

import pytest

from spatial_mamba_jax.data.prepare_imagenet import main as prepare_imagenet

IMAGENET = ("imagenet_tiny", "imagenet_small", "imagenet_base")
# Two stages of four channels in place of its model; the rest is the experiment.
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


def test_preparing_says_where(image_tree, tmp_path, capsys):
  prepare_imagenet([f"--image_folder={image_tree}", f"--data_dir={tmp_path}"])
  assert f"prepared {tmp_path}" in capsys.readouterr().out


@pytest.mark.parametrize("name", IMAGENET)
def test_the_imagenet_configs_train_two_steps(
  experiment, imagenet, tmp_path, name
):
  """With the whole recipe on, MESA from the first step."""
  experiment.path.write_text(IMAGENET_CONFIG.replace("NAME", name))
  workdir = tmp_path / "run"
  status, _, err = experiment.run(
    "train.py",
    f"--workdir={workdir}",
    f"--config.data.data_dir={imagenet}",
    "--config.data.image_size=32",
    # Processes take long to start, and need not for each of them.
    f"--config.data.num_workers={2 if name == 'imagenet_tiny' else 0}",
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
  assert re.fullmatch(f"ema{NUMBERS}raw{NUMBERS}", out)
