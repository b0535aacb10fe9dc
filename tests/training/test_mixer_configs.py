"""Experiments with other mixers and families, chosen by name."""

import pytest

from spatial_mamba_jax.models.mixers import MIXERS, SS2DConfig
from spatial_mamba_jax.training.config import ModelSection, TrainingError
from spatial_mamba_jax.training.config_file import load_config
from spatial_mamba_jax.training.experiment import (
  check_same_experiment,
  describe,
)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_chosen_by_one_word(name):
  config = load_config(f"configs/digits_mixers.py:{name}")
  config.validate()
  assert config.model.mixer == MIXERS[name]
  assert config.model.mixer is not MIXERS[name]  # Flags change it.
  config.model.mixer = load_config("configs/digits.py").model.mixer
  assert config == load_config("configs/digits.py")


def test_a_misspelt_mixer_is_one_line():
  with pytest.raises(TrainingError, match=r"'ss3d'; did you mean ss2d\?"):
    load_config("configs/digits_mixers.py:ss3d")


def test_vmamba_on_imagenet_is_the_recipe_without_mesa():
  config = load_config("configs/imagenet_vmamba_tiny.py")
  config.validate()
  tiny = load_config("configs/imagenet_tiny.py")
  assert config.model.build().mixer == SS2DConfig()
  config.model, config.mesa_weight = tiny.model, tiny.mesa_weight
  assert config == tiny


def test_a_preset_has_its_own_mixer_unless_another_is_given():
  section = ModelSection(name="vmamba_micro")
  section.validate()
  assert section.mixer == SS2DConfig()
  section.mixer.d_state = 3
  assert ModelSection(name="vmamba_micro").mixer == SS2DConfig()
  section = ModelSection(name="vmamba_micro", mixer=MIXERS["spatial_mamba"])
  assert section.build().mixer == MIXERS["spatial_mamba"]


def test_the_mixers_earlier_name_is_the_same_experiment():
  config = load_config("configs/digits.py")
  saved, now = (describe(config, 1500, ["correct"]) for _ in range(2))
  saved["model"]["mixer"]["name"] = "structure_aware"
  check_same_experiment(saved, now, "here")
  saved["model"]["mixer"]["name"] = "mamba"
  with pytest.raises(TrainingError, match=r"model\.mixer\.name was 'mamba'"):
    check_same_experiment(saved, now, "here")
