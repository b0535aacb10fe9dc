"""Invalid values end in one line that names the field."""

import dataclasses
import functools
import math
import os
import pathlib

import pytest

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models.mixers import StructureAwareConfig
from spatial_mamba_jax.tasks.classification import (
  ClassificationConfig,
  MixingConfig,
)
from spatial_mamba_jax.tasks.segmentation import SegmentationConfig
from spatial_mamba_jax.training.config import (
  Interval,
  ModelSection,
  OptimizerConfig,
  Schedule,
  TrainConfig,
  TrainingError,
  parse_interval,
)
from spatial_mamba_jax.training.config_file import load_config
from spatial_mamba_jax.training.experiment import (
  check_same_experiment,
  describe,
)

ROOT = pathlib.Path(__file__).parents[2]


def fields_of(section, prefix=""):
  """Yields (path, value) of every field that is not a section."""
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if dataclasses.is_dataclass(value):
      yield from fields_of(value, f"{prefix}{field.name}.")
    else:
      yield prefix + field.name, value


def make_config(**fields):
  return TrainConfig(task=ClassificationConfig(), **fields)


FIELDS = dict(fields_of(make_config()))
# Values of a wrong type, or beyond any machine.
NONSENSE = (
  *(None, object(), b"1", 1j, [], {}, set(), (), "many", "\0", "\ud800", ""),
  *(True, -1, 10**20, -(10**20), 10**5000, 0.5, 8.0, 1e300, -1e300, 1e999),
  *(math.nan, math.inf, -math.inf, int, print, (1,), (1, 2, 3), (0.0, 1.0)),
  *(("a", "b"), (None, 1), (True, True), (1, math.inf), (math.nan, 1.0)),
)
# The accepted ones: a bool is not a number, and 1.0 is not an int.
SENSE = {
  bool: (True,),
  int: (),
  float: (0.5, 8.0),
  str: ("many", ""),
  tuple: (),
  type(None): (None,),
}
# Fields that hold a length of time.
TIMES = {
  **dict.fromkeys(("length", "evaluate_every", "log_every"), ()),
  "optimizer.warmup": (),
  "checkpoint_every": ("",),
}
RATES = ("learning_rate", "warmup_learning_rate", "min_learning_rate")
EXCEPTIONS = {
  "model.remat": (None, True),
  "model.mlp_ratio": (0.5, 8.0),  # Or None, for that of the name.
  # Empty for those of the name; of another length they name the other as well.
  "model.dims": ((), [], (1,), (1, 2, 3)),
  "model.depths": ((), [], (1,), (1, 2, 3)),
  # Where it is not float32 that bounds them, a run diverges, and says so.
  **{f"optimizer.{rate}": (10**20,) for rate in RATES},
  "optimizer.clip_norm": (10**20, math.inf),
}


def set_field(config, path, value):
  section, _, name = path.rpartition(".")
  sections = section.split(".") if section else ()
  setattr(functools.reduce(getattr, sections, config), name, value)


def message_of(config):
  with pytest.raises(UserError) as caught:
    config.validate()
  return str(caught.value)


def test_defaults_are_valid():
  make_config().validate()


@pytest.mark.parametrize("path", FIELDS)
def test_invalid_values_are_refused_in_every_field(path):
  if path in TIMES:
    taken = TIMES[path]
  else:
    taken = (*SENSE[type(FIELDS[path])], *EXCEPTIONS.get(path, ()))
  config = make_config()
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
    ("task.erasing_probability", 1.1, "at most 1"),
    ("task.erasing_probability", -0.1, "at least 0"),
    ("task.label_smoothing", 1.0, "below 1"),
    ("mesa_start", 2.0, "at most 1"),
    ("task.mixing.probability", math.nan, "a number"),
    ("task.mixing.cutmix_probability", 1.5, "at most 1"),
    ("task.mixing.mixup_alpha", 0.0, "at least 1.17"),
    ("task.mixing.cutmix_alpha", math.inf, "at most 1000000"),
    ("optimizer.min_learning_rate", math.inf, "at most 3.4"),
    ("optimizer.learning_rate", 0.0, "at least 1.17"),
    ("optimizer.learning_rate", 3e38, "finite once scaled by batch_size"),
    # In float32 these are 1, and 0.
    ("optimizer.beta2", 1 - 1e-9, "at most 0.99999994"),
    ("ema_decay", 1 - 1e-9, "at most 0.99999994"),
    ("optimizer.epsilon", 1e-46, "at least 1.17"),
    ("optimizer.clip_norm", 0.0, "at least 1.17"),
    ("optimizer.layer_decay", 1.5, "at most 1"),
    ("optimizer.warmup", "300 epochs", "shorter than length=300 epochs"),
    ("optimizer.warmup", "-1 epochs", 'like "10 epochs" or "10 steps"'),
    ("optimizer.warmup", "10 minutes", 'like "10 epochs" or "10 steps"'),
    ("length", "1000000000 epochs", 'like "10 epochs" or "10 steps"'),
    ("length", "0 epochs", "more than 0"),
    ("length", "8", 'like "10 epochs" or "10 steps"'),
    ("length", "8.5 epochs", 'like "10 epochs" or "10 steps"'),
    ("length", "10 minutes", 'like "10 epochs" or "10 steps"'),
    ("length", "8 epochs 3 steps", 'like "10 epochs" or "10 steps"'),
    ("length", "\u0663 epochs", 'like "10 epochs" or "10 steps"'),
    ("evaluate_every", "0 steps", "more than 0"),
    ("evaluate_every", "10 minutes", 'like "10 epochs" or "10 steps"'),
    ("log_every", "0 steps", "more than 0"),
    ("log_every", "10 minutes", 'like "10 epochs" or "10 steps"'),
    ("checkpoint_every", "0 minutes", "more than 0"),
    ("checkpoint_every", "500", 'like "10 minutes" or "10 epochs" or "10 st'),
    ("checkpoint_every", "5 days", 'like "10 minutes" or "10 epochs" or "10'),
    ("batch_size", 2**20 + 1, "at most 1048576"),
    ("accumulation_steps", 0, "at least 1"),
    ("keep_last", 0, "at least 1"),
    ("seed", 2**32, "below 4294967296"),
    ("model.name", "vit", "one of spatial_mamba_base, spatial_mamba_micro"),
    ("model.mixer.d_state", 10**6, "at most 1024"),
    ("model.mixer.expand", 65, "at most 64"),
    ("model.dims", (4, 10**6), "at most 16384"),
    ("model.depths", (2, 0), "at least 1"),
    ("model.depths", (1, 1, 1, 1022), "at most 1024 blocks in all"),
    ("model.in_channels", 1025, "at most 1024"),
    ("task.num_classes", 0, "at least 1"),
    ("model.drop_path_rate", 1.0, "below 1"),
    ("model.mixer.implementation", "cuda", "one of xla, "),
    ("model.layer_implementation", "cuda", "one of xla"),
    ("model.dtype", "float8_e4m3fn", "one of bfloat16, float16, float32"),
    ("model.dtype", "float64", "float32 or narrower unless JAX_ENABLE_X64=1"),
    ("data.image_size", 10**20, "at most 16384"),
    ("data.crop_ratio", (1.0, math.inf), "at most 256"),
  ],
)
def test_wrong_values_are_named(field, value, what):
  config = make_config()
  set_field(config, field, value)
  message = message_of(config)
  assert message.startswith(f"config.{field} must be {what}")
  assert repr(value) in message or str(value) in message


def test_a_ratio_that_leaves_no_channel():
  config = make_config()
  config.model.mlp_ratio = 0.01
  assert message_of(config) == (
    "config.model.mlp_ratio must leave a hidden channel of 16, got 0.01"
  )


@pytest.mark.parametrize(
  ("field", "value"), [("dims", (4, 4)), ("depths", [1, 2, 3, 4, 5])]
)
def test_stages_are_those_of_channels_and_of_blocks(field, value):
  config = make_config()
  set_field(config, f"model.{field}", value)
  message = message_of(config)
  assert message.startswith(
    "config.model.dims and depths must name the same stages"
  )
  assert str(tuple(value)) in message


def test_the_extremes_are_valid():
  config = make_config(
    seed=2**32 - 1,
    length="999999999 epochs",
    evaluate_every="999999999 steps",
    log_every="1 step",
    ema_decay=0.9999999,
    mesa_start=1.0,
    linear_probe=True,
  )
  config.task.label_smoothing = 0.0
  config.optimizer.clip_norm = math.inf
  config.optimizer.warmup = "0 epochs"
  config.optimizer.learning_rate = 1e38
  config.data.crop_scale = [0.5, 0.5]
  config.model.remat = False
  config.validate()


@pytest.mark.usefixtures("x64")
def test_float64_where_jax_computes_in_it():
  config = make_config()
  config.model.dtype = "float64"
  config.validate()


def test_an_unknown_field_is_named():
  config = make_config()
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
  config = make_config(batch_size=2**12)
  config.data.image_size = 2**10
  validate(49)
  with pytest.raises(TrainingError, match=r"48 GiB of memory .* has 47 GiB"):
    validate(47)
  config = make_config()
  config.data.num_workers = 1024
  validate(66)
  with pytest.raises(TrainingError, match=r"config .* data\.num_workers"):
    validate(64)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("300 epochs", Interval(300, "epochs")),
    ("1 epoch", Interval(1, "epochs")),
    (" 2steps ", Interval(2, "steps")),
    ("0 steps", Interval(0, "steps")),
  ],
)
def test_lengths_are_parsed(text, expected):
  assert parse_interval(text, "config.length") == expected
  assert expected.steps(7) == expected.count * (
    7 if expected.unit == "epochs" else 1
  )


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("10 minutes", Interval(10, "minutes")),
    ("1minute", Interval(1, "minutes")),
    ("5 steps", Interval(5, "steps")),
    ("2 epochs", Interval(2, "epochs")),
    ("", None),
  ],
)
def test_lengths_between_checkpoints_are_parsed(text, expected):
  config = make_config(checkpoint_every=text)
  config.validate()
  assert config.checkpoint_interval() == expected


def test_lengths_are_converted_to_steps():
  """Lengths may be given in epochs or in steps."""

  def count(images, warmup, **times):
    optimizer = OptimizerConfig(warmup=warmup)
    return make_config(
      batch_size=100, optimizer=optimizer, mesa_weight=1.0, **times
    ).count_steps(images)

  in_epochs = {"evaluate_every": "2 epochs", "log_every": "1 epoch"}
  in_steps = {"evaluate_every": "4 steps", "log_every": "2 steps"}
  assert (
    count(250, "3 epochs", length="10 epochs", **in_epochs)
    == count(250, "6 steps", length="10 epochs", **in_steps)
    == Schedule(
      epoch=2, steps=20, warmup=6, evaluate_every=4, log_every=2, mesa_from=4
    )
  )
  assert (
    count(250, "3 epochs", length="20 steps", **in_epochs)
    == count(250, "6 steps", length="20 steps", **in_steps)
    == Schedule(
      epoch=2, steps=20, warmup=6, evaluate_every=4, log_every=2, mesa_from=5
    )
  )
  config = make_config(batch_size=100, length="21 epochs")
  assert config.count_steps(250).mesa_from is None  # `mesa_weight` is 0.


def test_steps_are_counted_in_int32():
  config = make_config(batch_size=100, length="2 epochs")
  config.optimizer.warmup = "0 epochs"
  times = config.count_steps(250)
  assert (times.epoch, times.steps) == (2, 4)
  with pytest.raises(
    TrainingError, match="batch_size=100 is larger than the 9"
  ):
    config.count_steps(99)
  config = make_config(batch_size=1, length="1000000 epochs")
  times = config.count_steps(2147)
  assert (times.epoch, times.steps) == (2147, 2147 * 10**6)
  with pytest.raises(
    TrainingError,
    match=r"config\.length is 2148000000 steps \(an epoch has 2148\), but must"
    r" be at most 2147483647$",
  ):
    config.count_steps(2148)


@pytest.mark.parametrize(
  ("length", "warmup"), [("10 epochs", "20 steps"), ("20 steps", "10 epochs")]
)
def test_the_warm_up_ends_whatever_it_is_counted_in(length, warmup):
  """An epoch has two steps, which `validate` does not know."""
  config = make_config(batch_size=100, length=length)
  config.optimizer.warmup = warmup
  config.validate()
  with pytest.raises(
    TrainingError, match=r"^config\.optimizer\.warmup is 20 steps .* most 19$"
  ):
    config.count_steps(250)
  config.optimizer.warmup = "19 steps"
  assert config.count_steps(250).warmup == 19


def test_a_log_window_is_one_that_float32_counts():
  def count(log_every, length="999999999 steps"):
    config = make_config(batch_size=1, length=length, log_every=log_every)
    config.optimizer.warmup = "0 steps"
    config.validate()
    return config.count_steps(2**12).log_every

  assert count("16777216 steps") == count("4096 epochs") == 2**24
  for text in ("16777217 steps", "4097 epochs"):
    with pytest.raises(
      TrainingError, match=r"^config\.log_every is .* must be at most 16777216$"
    ):
      count(text)
  # A run that ends before logs once, at its end.
  assert count("16777217 steps", length="9 steps") == 2**24 + 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=str)
def test_the_experiments_of_this_project_are_valid(path):
  load_config(str(path)).validate()


# An experiment as checkpoints held it before there were tasks and mixers.
# Of classification.
SUMS = ("correct",)
VERSION_1 = {
  "model": {
    "name": "spatial_mamba_tiny",
    "num_classes": 7,
    "d_state": 2,
    "drop_path_rate": 0.1,
    "dtype": "bfloat16",
    "implementation": "",
    "remat": True,
  },
  "data": {
    "name": "digits",
    "data_dir": "/old",
    "decoder": "pillow",
    "image_size": 32,
    "crop_scale": [0.5, 1.0],
    "crop_ratio": [0.75, 1.3333333333333333],
    "flip_probability": 0.0,
    "randaugment_operations": 3,
    "randaugment_magnitude": 4.0,
    "randaugment_std": 0.25,
    "test_crop_ratio": 1.0,
    "num_workers": 1,
    "num_threads": 2,
    "prefetch": 4,
    "max_unreadable_share": 0.001,
    "synthetic_images": 1024,
    "synthetic_classes": 1000,
  },
  "optimizer": {
    "learning_rate": 1e-3,
    "warmup_learning_rate": 1e-6,
    "min_learning_rate": 1e-5,
    "reference_batch_size": 64,
    "warmup_epochs": 1,
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.99,
    "epsilon": 1e-7,
    "clip_norm": 1.0,
    "layer_decay": 0.9,
  },
  "mixing": {
    "probability": 0.9,
    "cutmix_probability": 0.4,
    "mixup_alpha": 0.7,
    "cutmix_alpha": 0.6,
  },
  "batch_size": 128,
  "accumulation_steps": 2,
  "epochs": 4,
  "erasing_probability": 0.2,
  "label_smoothing": 0.3,
  "ema_decay": 0.99,
  "mesa_weight": 1.0,
  "mesa_start": 0.5,
  "init_from": "x.pth",
  "linear_probe": False,
  "seed": 3,
  "evaluation_batch_size": 32,
  "evaluate_every": 2,
  "checkpoint_every": "500",
  "log_every": 15,
  "keep_last": 3,
  "training_images": 1000,
}


def the_same_experiment():
  return TrainConfig(
    task=ClassificationConfig(
      num_classes=7,
      mixing=MixingConfig(
        probability=0.9,
        cutmix_probability=0.4,
        mixup_alpha=0.7,
        cutmix_alpha=0.6,
      ),
      erasing_probability=0.2,
      label_smoothing=0.3,
    ),
    model=ModelSection(
      name="spatial_mamba_tiny",
      mixer=StructureAwareConfig(d_state=2),
      drop_path_rate=0.1,
      dtype="bfloat16",
      remat=True,
    ),
    data=DataConfig(
      name="digits",
      data_dir="/new",
      image_size=32,
      crop_scale=(0.5, 1.0),
      flip_probability=0.0,
      randaugment_operations=3,
      randaugment_magnitude=4.0,
      randaugment_std=0.25,
      test_crop_ratio=1.0,
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-3,
      warmup_learning_rate=1e-6,
      min_learning_rate=1e-5,
      reference_batch_size=64,
      warmup="1 epoch",
      weight_decay=0.1,
      beta1=0.8,
      beta2=0.99,
      epsilon=1e-7,
      clip_norm=1.0,
      layer_decay=0.9,
    ),
    batch_size=128,
    accumulation_steps=2,
    length="4 epochs",
    ema_decay=0.99,
    mesa_weight=1.0,
    mesa_start=0.5,
    init_from="x.pth",
    seed=3,
    evaluate_every="1 epoch",
    checkpoint_every="10 minutes",
    log_every="50 steps",
  )


def test_an_experiment_of_an_earlier_version_is_equal():
  now = describe(the_same_experiment(), 1000, SUMS)
  check_same_experiment(VERSION_1, now, "run")
  # Presets may be renamed, and given by their stages.
  config = the_same_experiment()
  config.model.name = "spatial_mamba_base"
  config.model.dims, config.model.depths = (64, 128, 256, 512), [2, 4, 8, 4]
  check_same_experiment(VERSION_1, describe(config, 1000, SUMS), "run")
  # The name of `implementation` in earlier versions.
  for old, mixer, layers in (
    ("sequential", "sequential", "xla"),
    ("associative", "associative", "xla"),
  ):
    config = the_same_experiment()
    config.model.mixer.implementation = mixer
    config.model.layer_implementation = layers
    model = {**VERSION_1["model"], "implementation": old}
    saved = {**VERSION_1, "model": model}
    check_same_experiment(saved, describe(config, 1000, SUMS), "run")


OTHERS = {
  "length": ("5 epochs", "4 epochs"),
  "optimizer.warmup": ("1 step", "1 epochs"),
  "task.erasing_probability": (0.3, 0.2),
  "task.label_smoothing": (0.2, 0.3),
  "task.mixing.probability": (0.8, 0.9),
  "task.mixing.cutmix_probability": (0.5, 0.4),
  "task.mixing.mixup_alpha": (0.8, 0.7),
  "task.mixing.cutmix_alpha": (0.7, 0.6),
  "task.num_classes": (8, 7),
  "model.mixer.d_state": (1, 2),
  "model.mixer.expand": (3, 2),
  "model.mixer.implementation": ("xla", None),
  "model.layer_implementation": ("xla", None),
  "model.mlp_ratio": (3.0, 4.0),
  "model.in_channels": (1, 3),
  "model.depths": ((1, 1, 1, 1), [2, 4, 8, 4]),
  "model.dtype": ("float32", "bfloat16"),
  "optimizer.beta1": (0.9, 0.8),
  "data.crop_scale": ((0.6, 1.0), [0.5, 1.0]),
  "seed": (4, 3),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_changed_experiment_of_an_earlier_version_is_named(field):
  value, before = OTHERS[field]
  config = the_same_experiment()
  set_field(config, field, value)
  with pytest.raises(TrainingError) as caught:
    check_same_experiment(VERSION_1, describe(config, 1000, SUMS), "run")
  (difference,) = str(caught.value).split(": ", 1)[1].split("; ")[:-1]
  assert difference.startswith(f"{field} was {before!r} and is ")


def test_equal_lengths_may_be_written_differently():
  config, other = the_same_experiment(), the_same_experiment()
  other.length, other.optimizer.warmup = "4epoch", " 01 epochs"
  saved, now = (describe(x, 1000, SUMS) for x in (config, other))
  check_same_experiment(saved, now, "run")
  other.length = "4 steps"
  with pytest.raises(TrainingError, match="length was '4 epochs' and is '4 st"):
    check_same_experiment(saved, describe(other, 1000, SUMS), "run")


def test_how_a_segmentor_is_evaluated_may_change():
  config = the_same_experiment()
  config.task = SegmentationConfig(num_classes=7)
  saved = describe(config, 1000, SUMS)
  config.task.test_flip, config.task.test_ratios = True, (0.75, 1.0)
  config.task.test_window, config.task.test_stride = 64, 32
  check_same_experiment(saved, describe(config, 1000, SUMS), "run")
  config.task.box = (512, 512)
  with pytest.raises(
    TrainingError, match=r"holds another experiment: task\.box"
  ):
    check_same_experiment(saved, describe(config, 1000, SUMS), "run")
