"""What a run can be told: plain dataclasses, one experiment a file.

A file in `configs/` has a `get_config()` that returns a `TrainConfig`; its
fields are overridden on the command line, e.g. `--config.epochs=10`.
"""

import dataclasses
import json
import math
import os
import re
from typing import Any

import jax

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import (
  FLOAT32_BELOW_1,
  FLOAT32_MAX,
  FLOAT32_TINY,
  INT32_MAX,
  MAX_WEIGHT,
  Section,
  choice,
  number,
  show,
)
from spatial_mamba_jax.models import ModelConfig, list_models
from spatial_mamba_jax.models.config import (
  DTYPES,
  IMPLEMENTATIONS,
  MAX_CLASSES,
  MAX_STATES,
  get_model_config,
)

# Images a step: 16 times the largest batch that ImageNet was trained with.
MAX_BATCH = 2**20
# Passes over the images, and epochs between evaluations.
MAX_EPOCHS = 10**6
# Steps that a logged line averages over: it sums in float32, which counts no
# further by ones.
MAX_LOG_EVERY = 2**24
# Checkpoints kept: each is a directory, read when a run begins.
MAX_KEPT = 10**4
# Least memory of a process that reads images: that of Python and its packages.
_WORKER_BYTES = 2**26


class TrainingError(UserError):
  """A mistake of the user, told in one line."""


@dataclasses.dataclass
class ModelSection(Section):
  """The model; see `spatial_mamba_jax.models.ModelConfig`.

  Attributes:
    name: one of `spatial_mamba_jax.list_models()`.
    num_classes: classes of the dataset.
    d_state: states a channel.
    drop_path_rate: stochastic depth of the last block.
    dtype: precision of activations, "float32" or "bfloat16"; also "float16",
      and "float64" where JAX_ENABLE_X64=1 is in the environment.
    implementation: of the structure-aware SSM; empty for the platform's best.
      "sequential" and "associative" are without kernels for the rest, too.
    remat: whether most of a block is made again in the backward pass, with half
      of the memory, instead of being kept; None: unless on a GPU.
  """

  mistake = TrainingError

  name: str = choice("spatial_mamba_micro", among=list_models)
  num_classes: int = number(10, least=1, most=MAX_CLASSES)
  d_state: int = number(1, least=1, most=MAX_STATES)
  drop_path_rate: float = number(0.0, least=0, below=1)
  dtype: str = choice("float32", among=DTYPES)
  implementation: str = choice("", among=("", *IMPLEMENTATIONS))
  remat: bool | None = None

  def validate(self, path: str = "config.model") -> None:
    """Checks every value, as the architecture does."""
    super().validate(path)
    self.build(path)

  def build(self, path: str = "config.model") -> ModelConfig:
    """The architecture.

    Raises:
      TrainingError: the name or a value is wrong.
    """
    fields = dataclasses.asdict(self)
    fields["implementation"] = self.implementation or None
    try:
      return get_model_config(fields.pop("name"), **fields)
    except ValueError as error:  # It begins with the field's name.
      raise TrainingError(f"{path}.{error}") from error


@dataclasses.dataclass
class OptimizerConfig(Section):
  """AdamW with linear warm-up and a cosine, as the authors run it.

  The three learning rates are those of a batch of `reference_batch_size`
  images, and are scaled linearly to the batch size of the run.

  Attributes:
    learning_rate: the peak, after warm-up.
    warmup_learning_rate: at the first step.
    min_learning_rate: towards the last step.
    reference_batch_size: images a step that the learning rates are given for.
    warmup_epochs: epochs of linear warm-up.
    weight_decay: of every tensor with more than one dimension.
    beta1: decay of the mean of gradients.
    beta2: decay of the mean of squared gradients.
    epsilon: added to the root of the latter.
    clip_norm: largest global norm of the gradients; inf for any.
    layer_decay: the learning rate of a layer as a share of the next one's, from
      the head down to the stem (layer-wise learning-rate decay, for
      fine-tuning; arXiv 2106.08254 takes 0.65).
  """

  mistake = TrainingError

  learning_rate: float = number(5e-4, least=FLOAT32_TINY)
  warmup_learning_rate: float = number(5e-7, least=FLOAT32_TINY)
  min_learning_rate: float = number(5e-6, least=FLOAT32_TINY)
  reference_batch_size: int = number(512, least=1, most=MAX_BATCH)
  warmup_epochs: int = number(20, least=0, most=MAX_EPOCHS)
  weight_decay: float = number(0.05, least=0, most=MAX_WEIGHT)
  beta1: float = number(0.9, least=0, most=FLOAT32_BELOW_1)
  beta2: float = number(0.999, least=0, most=FLOAT32_BELOW_1)
  epsilon: float = number(1e-8, least=FLOAT32_TINY, most=MAX_WEIGHT)
  clip_norm: float = number(5.0, least=FLOAT32_TINY, most=math.inf)
  layer_decay: float = number(1.0, above=0, most=1)


@dataclasses.dataclass
class MixingConfig(Section):
  """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) of a batch.

  Attributes:
    probability: with which a batch is mixed at all; 0 for never.
    cutmix_probability: with which a mixed batch gets cutmix, and not mixup.
    mixup_alpha: mixup's share of each image is Beta(mixup_alpha, mixup_alpha).
    cutmix_alpha: the same of cutmix, for the area that stays.
  """

  mistake = TrainingError

  probability: float = number(1.0, least=0, most=1)
  cutmix_probability: float = number(0.5, least=0, most=1)
  mixup_alpha: float = number(0.8, least=FLOAT32_TINY, most=MAX_WEIGHT)
  cutmix_alpha: float = number(1.0, least=FLOAT32_TINY, most=MAX_WEIGHT)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A time: so many "steps" or "minutes"."""

  count: int
  unit: str


_INTERVAL = re.compile(r"\s*([1-9][0-9]{0,8})\s*(step|minute)?s?\s*")


@dataclasses.dataclass
class TrainConfig(Section):
  """One experiment.

  Attributes:
    model: the model.
    data: the dataset and its transforms.
    optimizer: the optimizer and its schedule.
    mixing: mixup and cutmix.
    batch_size: images a step, over all devices and processes.
    accumulation_steps: parts that a step's batch is computed in, to save
      memory; BatchNorm then sees one part at a time.
    epochs: passes over the training images.
    erasing_probability: with which a box of a training image is filled with
      noise (random erasing, arXiv 1708.04896).
    label_smoothing: share of the target spread over all classes.
    ema_decay: of the moving average of parameters and BatchNorm statistics.
    mesa_weight: weight of the loss against that average's predictions (MESA,
      arXiv 2205.14083); 0 for none.
    mesa_start: share of the epochs after which it begins.
    init_from: weights to start from instead of random ones: a file or directory
      of any kind that `python -m spatial_mamba_jax.convert` reads. A head of
      another number of classes is drawn at random.
    linear_probe: whether to train the head alone; all else stays as it is.
    seed: of the initialisation, the order of images and all augmentation.
    evaluation_batch_size: images a step of evaluation, over all devices.
    evaluate_every: epochs between evaluations, each after a checkpoint.
    checkpoint_every: time between further checkpoints, as "500 steps" or
      "10 minutes"; a number alone counts steps. Empty for none.
    log_every: steps that each logged line averages over.
    keep_last: newest checkpoints kept, beside the best.
  """

  mistake = TrainingError

  model: ModelSection = dataclasses.field(default_factory=ModelSection)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
  batch_size: int = number(1024, least=1, most=MAX_BATCH)
  accumulation_steps: int = number(1, least=1)
  epochs: int = number(300, least=1, most=MAX_EPOCHS)
  erasing_probability: float = number(0.25, least=0, most=1)
  label_smoothing: float = number(0.1, least=0, below=1)
  ema_decay: float = number(0.9999, least=0, most=FLOAT32_BELOW_1)
  mesa_weight: float = number(0.0, least=0, most=MAX_WEIGHT)
  mesa_start: float = number(0.25, least=0, most=1)
  init_from: str = ""
  linear_probe: bool = False
  seed: int = number(0, least=0, below=2**32)
  evaluation_batch_size: int = number(512, least=1, most=MAX_BATCH)
  evaluate_every: int = number(1, least=1, most=MAX_EPOCHS)
  checkpoint_every: str = "10 minutes"
  log_every: int = number(50, least=1, most=MAX_LOG_EVERY)
  keep_last: int = number(2, least=1, most=MAX_KEPT)

  def checkpoint_interval(self) -> Interval | None:
    """What `checkpoint_every` says.

    Raises:
      TrainingError: it is neither steps nor minutes.
    """
    if not self.checkpoint_every:
      return None
    match = _INTERVAL.fullmatch(self.checkpoint_every)
    if match is None:
      raise TrainingError(
        'config.checkpoint_every must be "500 steps", "10 minutes" or empty,'
        f" got {show(self.checkpoint_every)}"
      )
    return Interval(int(match[1]), f"{match[2] or 'step'}s")

  def validate(self, path: str = "config") -> None:
    """Checks every value.

    Raises:
      TrainingError, DataError: naming the first field that makes no sense.
    """
    super().validate(path)
    self.checkpoint_interval()
    self.require(
      self.batch_size % self.accumulation_steps == 0,
      path,
      "batch_size",
      f"a multiple of accumulation_steps={self.accumulation_steps}",
    )
    optimizer = self.optimizer
    optimizer.require(
      optimizer.warmup_epochs < self.epochs,
      f"{path}.optimizer",
      "warmup_epochs",
      f"below epochs={self.epochs}",
    )
    scale = self.batch_size / optimizer.reference_batch_size
    for field in ("learning_rate", "warmup_learning_rate", "min_learning_rate"):
      optimizer.require(
        getattr(optimizer, field) * scale <= FLOAT32_MAX,
        f"{path}.optimizer",
        field,
        "finite once scaled by batch_size / reference_batch_size",
      )
    self._require_memory(path)

  def _require_memory(self, path: str) -> None:
    """Raises where the pictures that are kept ready exceed this host."""
    hosts = jax.process_count() if jax.distributed.is_initialized() else 1
    images = max(self.batch_size, self.evaluation_batch_size) / hosts
    batches = self.data.prefetch * images * 3 * self.data.image_size**2
    needed = batches + self.data.num_workers * _WORKER_BYTES
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
      raise TrainingError(
        f"{path} asks for {needed / 2**30:,.0f} GiB of memory for images, and"
        f" this host has {there / 2**30:,.0f} GiB: lower batch_size,"
        " evaluation_batch_size, data.image_size, data.prefetch or"
        " data.num_workers"
      )

  def count_steps(self, training_images: int) -> tuple[int, int]:
    """Steps an epoch, and of the whole run.

    Raises:
      TrainingError: there is no whole batch, or an int32 cannot count the
        steps.
    """
    epoch_steps = training_images // self.batch_size
    if not epoch_steps:
      raise TrainingError(
        f"config.batch_size={self.batch_size} is larger than the"
        f" {training_images} training images"
      )
    steps = self.epochs * epoch_steps
    if steps > INT32_MAX:
      raise TrainingError(
        f"config.epochs={self.epochs} of {epoch_steps} steps are more than the"
        f" {INT32_MAX} that a run can count"
      )
    return epoch_steps, steps


# What changes neither the parameters nor what they are trained on.
_FREE_TO_CHANGE = (
  "data.data_dir",
  "data.num_workers",
  "data.num_threads",
  "data.prefetch",
  "data.max_unreadable_share",
  "evaluation_batch_size",
  "evaluate_every",
  "checkpoint_every",
  "log_every",
  "keep_last",
)


def check_same_experiment(
  saved: dict[str, Any], now: dict[str, Any], where: str
) -> None:
  """Refuses to resume a checkpoint with a config that contradicts it.

  Args:
    saved: the experiment of the checkpoint, as nested dictionaries.
    now: that of the run to be.
    where: the working directory, for the message.

  Raises:
    TrainingError: naming the fields that differ.
  """
  old, new = _flatten(saved), _flatten(now)
  differing = [
    f"{field} was {old.get(field)!r} and is {new.get(field)!r}"
    for field in sorted(old.keys() | new.keys())
    if old.get(field) != new.get(field) and field not in _FREE_TO_CHANGE
  ]
  if differing:
    raise TrainingError(
      f"{where} holds another experiment: {'; '.join(differing)}; choose"
      " another workdir, or the old values"
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
  """The whole config as JSON has it, defaults and overrides resolved."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[prefix + key] = value
  return flat
