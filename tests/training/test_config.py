"""Values that make no sense end in one line that names them."""

import pytest

from spatial_mamba_jax.training.config import TrainConfig, TrainingError


def test_defaults_are_valid():
  TrainConfig().validate()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("erasing_probability", 1.1),
    ("erasing_probability", -0.1),
    ("label_smoothing", 1.0),
    ("mesa_start", 2.0),
    ("mixing.probability", float("nan")),
    ("mixing.cutmix_probability", 1.5),
    ("mixing.mixup_alpha", 0.0),
    ("mixing.cutmix_alpha", float("inf")),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.beta2", 1.0),
  ],
)
def test_wrong_values_are_named(field, value):
  config = TrainConfig()
  section, _, name = field.rpartition(".")
  setattr(getattr(config, section) if section else config, name, value)
  with pytest.raises(TrainingError) as caught:
    config.validate()
  message = str(caught.value)
  assert message.startswith(f"config.{field} must be ")
  assert message.endswith(f"got {value!r}")
