"""What a run can be told: plain dataclasses, one experiment a file.

A file in `configs/` has a `get_config()` that returns a `TrainConfig`; its
fields are overridden on the command line, e.g. `--config.epochs=10`.
"""

import dataclasses
import json
import math
import re
from typing import Any

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.models import ModelConfig
from spatial_mamba_jax.models.config import get_model_config


class TrainingError(UserError):
  """A mistake of the user, told in one line."""


@dataclasses.dataclass
class ModelSection:
  """The model; see `spatial_mamba_jax.models.ModelConfig`.

  Attributes:
    name: one of `spatial_mamba_jax.list_models()`.
    num_classes: classes of the dataset.
    d_state: states a channel.
    drop_path_rate: stochastic depth of the last block.
    dtype: precision of activations, "float32" or "bfloat16".
    implementation: of the structure-aware SSM; empty for the platform's best.
      "sequential" and "associative" are without kernels for the rest, too.
    remat: whether most of a block is made again in the backward pass, with half
      of the memory, instead of being kept; None: unless on a GPU.
  """

  name: str = "spatial_mamba_micro"
  num_classes: int = 10
  d_state: int = 1
  drop_path_rate: float = 0.0
  dtype: str = "float32"
  implementation: str = ""
  remat: bool | None = None

  def build(self) -> ModelConfig:
    """The architecture.

    Raises:
      TrainingError: the name or a value is wrong.
    """
    fields = dataclasses.asdict(self)
    fields["implementation"] = self.implementation or None
    try:
      return get_model_config(fields.pop("name"), **fields)
    except (TypeError, ValueError) as error:
      raise TrainingError(f"config.model: {error}") from error


@dataclasses.dataclass
class OptimizerConfig:
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
    clip_norm: largest global norm of the gradients.
    layer_decay: the learning rate of a layer as a share of the next one's, from
      the head down to the stem (layer-wise learning-rate decay, for
      fine-tuning; arXiv 2106.08254 takes 0.65).
  """

  learning_rate: float = 5e-4
  warmup_learning_rate: float = 5e-7
  min_learning_rate: float = 5e-6
  reference_batch_size: int = 512
  warmup_epochs: int = 20
  weight_decay: float = 0.05
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-8
  clip_norm: float = 5.0
  layer_decay: float = 1.0


@dataclasses.dataclass
class MixingConfig:
  """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) of a batch.

  Attributes:
    probability: with which a batch is mixed at all; 0 for never.
    cutmix_probability: with which a mixed batch gets cutmix, and not mixup.
    mixup_alpha: mixup's share of each image is Beta(mixup_alpha, mixup_alpha).
    cutmix_alpha: the same of cutmix, for the area that stays.
  """

  probability: float = 1.0
  cutmix_probability: float = 0.5
  mixup_alpha: float = 0.8
  cutmix_alpha: float = 1.0


@dataclasses.dataclass(frozen=True)
class Interval:
  """A time: so many "steps" or "minutes"."""

  count: int
  unit: str


_INTERVAL = re.compile(r"\s*([1-9][0-9]{0,8})\s*(step|minute)?s?\s*")


@dataclasses.dataclass
class TrainConfig:
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

  model: ModelSection = dataclasses.field(default_factory=ModelSection)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
  batch_size: int = 1024
  accumulation_steps: int = 1
  epochs: int = 300
  erasing_probability: float = 0.25
  label_smoothing: float = 0.1
  ema_decay: float = 0.9999
  mesa_weight: float = 0.0
  mesa_start: float = 0.25
  init_from: str = ""
  linear_probe: bool = False
  seed: int = 0
  evaluation_batch_size: int = 512
  evaluate_every: int = 1
  checkpoint_every: str = "10 minutes"
  log_every: int = 50
  keep_last: int = 2

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
        f" got {self.checkpoint_every!r}"
      )
    return Interval(int(match[1]), f"{match[2] or 'step'}s")

  def validate(self) -> None:
    """Checks every value.

    Raises:
      TrainingError, DataError: naming the first field that makes no sense.
    """
    self.model.build()
    self.data.validate()
    self.checkpoint_interval()
    for field in (
      "batch_size", "accumulation_steps", "epochs", "evaluation_batch_size",
      "evaluate_every", "log_every", "keep_last",
    ):  # fmt: skip
      _require(getattr(self, field) >= 1, self, field, "at least 1")
    _require(
      self.batch_size % self.accumulation_steps == 0,
      self,
      "batch_size",
      f"a multiple of accumulation_steps={self.accumulation_steps}",
    )
    mixing = self.mixing
    for section, field in (
      (self, "erasing_probability"),
      (mixing, "probability"),
      (mixing, "cutmix_probability"),
    ):
      _require(0 <= getattr(section, field) <= 1, section, field, "in [0, 1]")
    for field in ("mixup_alpha", "cutmix_alpha"):
      _require(0 < getattr(mixing, field) < math.inf, mixing, field, "above 0")
    for field in ("label_smoothing", "ema_decay"):
      _require(0 <= getattr(self, field) < 1, self, field, "in [0, 1)")
    _require(0 <= self.seed < 2**32, self, "seed", "in [0, 2**32)")
    _require(0 <= self.mesa_start <= 1, self, "mesa_start", "in [0, 1]")
    _require(self.mesa_weight >= 0, self, "mesa_weight", "0 or more")
    optimizer = self.optimizer
    for field in (
      "learning_rate", "warmup_learning_rate", "min_learning_rate",
      "reference_batch_size", "epsilon", "clip_norm",
    ):  # fmt: skip
      _require(getattr(optimizer, field) > 0, optimizer, field, "above 0")
    _require(
      0 <= optimizer.warmup_epochs < self.epochs,
      optimizer,
      "warmup_epochs",
      f"at least 0 and below epochs={self.epochs}",
    )
    _require(
      optimizer.weight_decay >= 0, optimizer, "weight_decay", "0 or more"
    )
    _require(
      0 < optimizer.layer_decay <= 1, optimizer, "layer_decay", "in (0, 1]"
    )
    for field in ("beta1", "beta2"):
      _require(
        0 <= getattr(optimizer, field) < 1, optimizer, field, "in [0, 1)"
      )


def _require(accepted: bool, section: Any, field: str, what: str) -> None:
  if not accepted:
    sections = {OptimizerConfig: ".optimizer", MixingConfig: ".mixing"}
    path = "config" + sections.get(type(section), "")
    raise TrainingError(
      f"{path}.{field} must be {what}, got {getattr(section, field)!r}"
    )


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
