"""Values that make no sense end in one line that names them."""

import dataclasses
import math
import os
import pathlib

import pytest

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.config_file import load_config

ROOT = pathlib.Path(__file__).parents[2]


def fields_of(section, prefix=""):
  """(path, value) of every field that is no section."""
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      yield from fields_of(value, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, value


FIELDS = dict(fields_of(TrainConfig()))
# Of no type, of another type, or beyond any machine.
NONSENSE = (
  *(None, object(), b"1", 1j, [], {}, set(), (), "many", "\0", "\ud800", ""),
  *(True, -1, 10**20, -(10**20), 10**5000, 0.5, 8.0, 1e300, -1e300, 1e999),
  *(math.nan, math.inf, -math.inf, int, print, (1,), (1, 2, 3), (0.0, 1.0)),
  *(("a", "b"), (None, 1), (True, True), (1, math.inf), (math.nan, 1.0)),
)
# What a field takes of it; a bool is no number, nor a whole float an int.
SENSE = {
  bool: (True,),
  int: (),
  float: (0.5, 8.0),
  str: ("many", ""),
  tuple: (),
  type(None): (None, True),
}
RATES = ("learning_rate", "warmup_learning_rate", "min_learning_rate")
EXCEPTIONS = {
  # Where it is not float32 that bounds them, a run diverges, and says so.
  **{f"optimizer.{rate}": (10**20,) for rate in RATES},
  "optimizer.clip_norm": (10**20, math.inf),
}


def set_field(config, path, value):
  section, _, name = path.rpartition(".")
  setattr(getattr(config, section) if section else config, name, value)


def message_of(config):
  with pytest.raises(UserError) as caught:
    config.validate()
  return str(caught.value)


def test_defaults_are_valid():
  TrainConfig().validate()


@pytest.mark.parametrize("path", FIELDS)
def test_nonsense_is_refused_everywhere(path):
  taken = (*SENSE[type(FIELDS[path])], *EXCEPTIONS.get(path, ()))
  config = TrainConfig()
  for value in NONSENSE:
    if any(type(value) is type(x) and value == x for x in taken):
      continue
    set_field(config, path, value)
    message = message_of(config)
    assert message.startswith(f"config.{path} must be "), (message, path)
    assert len(message) < 300
    assert message.isprintable()


@pytest.mark.parametrize(
  ("field", "value", "what"),
  [
    ("erasing_probability", 1.1, "at most 1"),
    ("erasing_probability", -0.1, "at least 0"),
    ("label_smoothing", 1.0, "below 1"),
    ("mesa_start", 2.0, "at most 1"),
    ("mixing.probability", math.nan, "a number"),
    ("mixing.cutmix_probability", 1.5, "at most 1"),
    ("mixing.mixup_alpha", 0.0, "at least 1.17"),
    ("mixing.cutmix_alpha", math.inf, "at most 1000000"),
    ("optimizer.min_learning_rate", math.inf, "at most 3.4"),
    ("optimizer.learning_rate", 0.0, "at least 1.17"),
    ("optimizer.learning_rate", 3e38, "finite once scaled by batch_size"),
    # In float32 these are 1, and 0.
    ("optimizer.beta2", 1 - 1e-9, "at most 0.99999994"),
    ("ema_decay", 1 - 1e-9, "at most 0.99999994"),
    ("optimizer.epsilon", 1e-46, "at least 1.17"),
    ("optimizer.clip_norm", 0.0, "at least 1.17"),
    ("optimizer.layer_decay", 1.5, "at most 1"),
    ("optimizer.warmup_epochs", 300, "below epochs=300"),
    ("epochs", 10**7, "at most 1000000"),
    ("batch_size", 2**20 + 1, "at most 1048576"),
    ("accumulation_steps", 0, "at least 1"),
    ("keep_last", 0, "at least 1"),
    ("log_every", 2**24 + 1, "at most 16777216"),
    ("seed", 2**32, "below 4294967296"),
    ("model.name", "vit", "one of spatial_mamba_base, spatial_mamba_micro"),
    ("model.d_state", 10**6, "at most 1024"),
    ("model.num_classes", 0, "at least 1"),
    ("model.drop_path_rate", 1.0, "below 1"),
    ("model.implementation", "cuda", "one of empty, sequential, associative"),
    ("model.dtype", "float8_e4m3fn", "one of bfloat16, float16, float32"),
    ("model.dtype", "float64", "float32 or narrower unless JAX_ENABLE_X64=1"),
    ("data.image_size", 10**20, "at most 16384"),
    ("data.crop_ratio", (1.0, math.inf), "at most 256"),
  ],
)
def test_wrong_values_are_named(field, value, what):
  config = TrainConfig()
  set_field(config, field, value)
  message = message_of(config)
  assert message.startswith(f"config.{field} must be {what}")
  assert repr(value) in message or str(value) in message


def test_the_extremes_are_valid():
  config = TrainConfig(
    seed=2**32 - 1,
    epochs=10**6,
    evaluate_every=10**6,
    log_every=2**24,
    label_smoothing=0.0,
    ema_decay=0.9999999,
    mesa_start=1.0,
    linear_probe=True,
  )
  config.optimizer.clip_norm = math.inf
  config.optimizer.warmup_epochs = 0
  config.optimizer.learning_rate = 1e38
  config.data.crop_scale = [0.5, 0.5]
  config.model.remat = False
  config.validate()


@pytest.mark.usefixtures("x64")
def test_float64_where_jax_computes_in_it():
  config = TrainConfig()
  config.model.dtype = "float64"
  config.validate()


def test_a_field_that_is_none_is_told_of():
  config = TrainConfig()
  config.optimizer.learning_rates = 1.0
  assert message_of(config) == (
    "config.optimizer.learning_rates: no such field; did you mean"
    " learning_rate?"
  )


def test_images_that_memory_cannot_hold(monkeypatch):
  def validate(gigabytes):
    size = gigabytes * 2**18 * 4096
    monkeypatch.setattr(
      os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": size // 4096}.get
    )
    config.validate()

  # 2**12 images of 2**20 pixels of 3 bytes, ready four times: 48 GiB.
  config = TrainConfig(batch_size=2**12)
  config.data.image_size = 2**10
  validate(49)
  with pytest.raises(TrainingError, match=r"48 GiB of memory .* has 47 GiB"):
    validate(47)
  config = TrainConfig()
  config.data.num_workers = 1024
  validate(66)
  with pytest.raises(TrainingError, match=r"config .* data\.num_workers"):
    validate(64)


def test_steps_are_counted_in_int32():
  config = TrainConfig(batch_size=100, epochs=2)
  assert config.count_steps(250) == (2, 4)
  with pytest.raises(
    TrainingError, match="batch_size=100 is larger than the 9"
  ):
    config.count_steps(99)
  config = TrainConfig(batch_size=1, epochs=10**6)
  assert config.count_steps(2147) == (2147, 2147 * 10**6)
  with pytest.raises(TrainingError, match=r"config\.epochs=1000000 of 2148 st"):
    config.count_steps(2148)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=str)
def test_the_experiments_of_this_project_are_valid(path):
  load_config(str(path)).validate()
