"""The config of an experiment: plain dataclasses, one experiment per file.

A file in `configs/` has a `get_config()` that returns a `TrainConfig`; its
fields are overridden on the command line, e.g. `--config.length="10 epochs"`.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any, cast

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
from spatial_mamba_jax.models import Family, ModelConfig, list_models
from spatial_mamba_jax.models.config import (
  DTYPES,
  MAX_BLOCKS,
  MAX_CHANNELS,
  MAX_IMAGE_CHANNELS,
)
from spatial_mamba_jax.models.mixers import MixerConfig, StructureAwareConfig
from spatial_mamba_jax.models.mixers.base import MAX_EXPANSION
from spatial_mamba_jax.models.presets import get_model_config
from spatial_mamba_jax.tasks.base import Task, TaskConfig

# Largest batch size: 16 times the largest that ImageNet was trained with.
MAX_BATCH = 2**20
# Most devices along an axis of the mesh.
MAX_DEVICES = 2**20
# Largest `log_every` in steps. Steps are counted in float32, exactly up to this
# number.
MAX_LOG_EVERY = 2**24
# Largest `keep_last`. A run reads every checkpoint directory when it starts.
MAX_KEPT = 10**4
# Memory of a worker process without images: Python and its packages.
_WORKER_BYTES = 2**26


class TrainingError(UserError):
  """A mistake of the user in an experiment, its data or its directory."""


@dataclasses.dataclass
class ModelSection(Section):
  """The model; see `spatial_mamba_jax.models.ModelConfig`.

  Attributes:
    name: the preset, one of `spatial_mamba_jax.list_models()`.
    family: constructors of the parts of the network; None for the preset's.
    dims: channels of each stage; empty for the preset's.
    depths: blocks of each stage; empty for the preset's.
    in_channels: channels of the images; None for the preset's.
    mixer: the token mixer and its settings, of the package `models.mixers`;
      None for that of the preset `name`. A flag with another name does not
      change the mixer.
    mlp_ratio: hidden channels of the MLP divided by the channels of its stage;
      None for the preset's.
    drop_path_rate: stochastic-depth rate of the last block.
    dtype: type of activations, "float32", "bfloat16" or "float16"; "float64"
      where JAX_ENABLE_X64=1 is in the environment.
    layer_implementation: implementation of all layers but the mixer: None for
      the platform's best, "xla" for no kernels.
    remat: whether the backward pass recomputes most of a block instead of
      saving it, which halves the memory; None for True except on a GPU.
  """

  mistake = TrainingError

  name: str = choice("spatial_mamba_micro", among=list_models)
  family: Family | None = None
  dims: tuple[int, ...] = number((), least=1, most=MAX_CHANNELS)
  depths: tuple[int, ...] = number((), least=1, most=MAX_BLOCKS)
  in_channels: int | None = number(None, least=1, most=MAX_IMAGE_CHANNELS)
  # None is replaced at once, so that flags find the mixer's settings.
  mixer: MixerConfig = dataclasses.field(default=cast(Any, None))
  mlp_ratio: float | None = number(None, above=0, most=MAX_EXPANSION)
  drop_path_rate: float = number(0.0, least=0, below=1)
  dtype: str = choice("float32", among=DTYPES)
  layer_implementation: str | None = choice(None, among=("xla",))
  remat: bool | None = None

  def __post_init__(self):
    if self.mixer is None:
      is_known = self.name in list_models()
      self.mixer = (
        dataclasses.replace(get_model_config(self.name).mixer)
        if is_known  # Else `validate` refuses the name.
        else StructureAwareConfig()
      )

  def validate(self, path: str = "config.model") -> None:
    """Checks every field, and that the architecture can be built."""
    super().validate(path)
    self.build(path)

  def build(self, path: str = "config.model") -> ModelConfig:
    """Creates the architecture.

    Raises:
      TrainingError: the name or a value is wrong.
    """
    fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
    # Without these fields, the preset's apply.
    for field in ("family", "dims", "depths", "in_channels", "mlp_ratio"):
      if fields[field] in ((), [], None):
        del fields[field]
    # Copied, because the section is mutable.
    fields["mixer"] = dataclasses.replace(self.mixer)
    try:
      return get_model_config(fields.pop("name"), **fields)
    except ValueError as error:  # The message begins with the field's name.
      raise TrainingError(f"{path}.{error}") from error


@dataclasses.dataclass
class OptimizerConfig(Section):
  """AdamW with linear warm-up and a schedule, as the authors use it.

  The three learning rates are for a batch of `reference_batch_size` images.
  They are scaled linearly to the batch size of the run.

  Attributes:
    learning_rate: the peak learning rate, after warm-up.
    warmup_learning_rate: the learning rate of the first step.
    min_learning_rate: the learning rate at the end of the schedule.
    schedule: how the learning rate falls after warm-up: "cosine", as in the
      recipe for classification, or "linear", as in that for segmentation.
    reference_batch_size: the batch size that the learning rates are for.
    warmup: length of the linear warm-up, "20 epochs" or "1500 steps".
    weight_decay: rate of weight decay.
    undecayed: the parameters that do not decay: "vectors", those of one
      dimension, as in the recipe for classification; or "norms", those with
      "norm" in the name that the authors have for them, as in the recipe for
      segmentation.
    beta1: decay rate of the mean of gradients.
    beta2: decay rate of the mean of squared gradients.
    epsilon: constant added to the root of the mean of squared gradients.
    clip_norm: largest global norm of the gradients; inf for no clipping.
    layer_decay: ratio of a layer's learning rate to that of the next layer,
      from the head down to the stem (layer-wise learning-rate decay, for
      fine-tuning; arXiv 2106.08254 uses 0.65).
  """

  mistake = TrainingError

  learning_rate: float = number(5e-4, least=FLOAT32_TINY)
  warmup_learning_rate: float = number(5e-7, least=FLOAT32_TINY)
  min_learning_rate: float = number(5e-6, least=0)
  schedule: str = choice("cosine", among=("cosine", "linear"))
  reference_batch_size: int = number(512, least=1, most=MAX_BATCH)
  warmup: str = "20 epochs"
  weight_decay: float = number(0.05, least=0, most=MAX_WEIGHT)
  undecayed: str = choice("vectors", among=("vectors", "norms"))
  beta1: float = number(0.9, least=0, most=FLOAT32_BELOW_1)
  beta2: float = number(0.999, least=0, most=FLOAT32_BELOW_1)
  epsilon: float = number(1e-8, least=FLOAT32_TINY, most=MAX_WEIGHT)
  clip_norm: float = number(5.0, least=FLOAT32_TINY, most=math.inf)
  layer_decay: float = number(1.0, above=0, most=1)


@dataclasses.dataclass
class MeshConfig(Section):
  """How the devices of all processes share the work.

  Every device computes its own images. The devices that are neither in
  `replica` nor in `fsdp` are along a third axis, `data`.

  Attributes:
    replica: groups of devices that a slower network joins, such as slices of
      TPUs; only gradients and statistics cross it.
    fsdp: devices that share parameters, moments and moving average, each with
      a shard of them (arXiv 2304.11277); 1 for all on every device.
  """

  mistake = TrainingError

  replica: int = number(1, least=1, most=MAX_DEVICES)
  fsdp: int = number(1, least=1, most=MAX_DEVICES)


@dataclasses.dataclass(frozen=True)
class Interval:
  """A duration: a number of "epochs", "steps" or "minutes"."""

  count: int
  unit: str

  def __str__(self) -> str:
    return f"{self.count} {self.unit}"

  def steps(self, epoch_steps: int) -> int:
    """Converts epochs or steps to steps; minutes have no conversion."""
    return self.count * (epoch_steps if self.unit == "epochs" else 1)


_INTERVAL = re.compile(r"\s*([0-9]{1,9})\s*(epoch|step|minute)s?\s*")


def parse_interval(
  text: str, path: str, units: Sequence[str] = ("epochs", "steps")
) -> Interval:
  """Parses an interval such as "300 epochs" or "1 step".

  Args:
    text: the interval.
    path: the path of the config's field, for messages.
    units: the accepted units.

  Raises:
    TrainingError: the text is not an interval in one of these units.
  """
  match = _INTERVAL.fullmatch(text)
  if match is None or f"{match[2]}s" not in units:
    examples = " or ".join(f'"10 {unit}"' for unit in units)
    raise TrainingError(f"{path} must be like {examples}, got {show(text)}")
  return Interval(int(match[1]), f"{match[2]}s")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The durations of a run, in steps.

  Attributes:
    epoch: steps per epoch.
    steps: steps of the whole run.
    warmup: steps of the learning rate's warm-up.
    evaluate_every: steps between evaluations.
    log_every: steps that a logged line averages over.
    mesa_from: the step after which MESA begins; None for no MESA.
  """

  epoch: int
  steps: int
  warmup: int
  evaluate_every: int
  log_every: int
  mesa_from: int | None


@dataclasses.dataclass
class TrainConfig(Section):
  """One experiment.

  Attributes:
    model: the model.
    data: the dataset and its transforms.
    task: the task and its settings.
    optimizer: the optimizer and its schedule.
    mesh: how devices share the work.
    batch_size: images per step, over all devices and processes.
    accumulation_steps: microbatches per step. Their gradients are accumulated,
      which saves memory; BatchNorm sees one microbatch at a time.
    length: length of the run, "300 epochs" (passes over the training images) or
      "90000 steps".
    ema_decay: decay rate of the moving average of parameters and BatchNorm
      statistics.
    mesa_weight: weight of the loss against the moving average's predictions
      (MESA, arXiv 2205.14083); 0 for no MESA.
    mesa_start: fraction of the run after which MESA begins, rounded down to the
      unit of `length`: "3 epochs" and 0.25 begin at once.
    init_from: weights to start from instead of random ones: any file or
      directory that `python -m spatial_mamba_jax.convert` reads. The head
      keeps its initial values if the weights have none that fits.
    linear_probe: whether to train the head only and freeze the backbone.
    seed: seed of the initialisation, the order of images and all augmentation.
    evaluation_batch_size: images per evaluation step, over all devices.
    evaluate_every: time between evaluations, "1 epoch" or "5000 steps". A
      checkpoint is saved before each. The last step is always evaluated.
    checkpoint_every: time between further checkpoints, "10 minutes", "2 epochs"
      or "500 steps"; empty for none.
    local_checkpoint_dir: a directory on a fast disk of each host, or /dev/shm.
      Checkpoints are saved there and copied to the workdir in the background.
      A relative one is relative to the current directory. Empty for none.
    log_every: the steps that each logged line averages over, "50 steps" or
      "1 epoch".
    keep_last: the number of newest checkpoints to keep, besides the best.
  """

  mistake = TrainingError

  task: TaskConfig
  model: ModelSection = dataclasses.field(default_factory=ModelSection)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  batch_size: int = number(1024, least=1, most=MAX_BATCH)
  accumulation_steps: int = number(1, least=1)
  length: str = "300 epochs"
  ema_decay: float = number(0.9999, least=0, most=FLOAT32_BELOW_1)
  mesa_weight: float = number(0.0, least=0, most=MAX_WEIGHT)
  mesa_start: float = number(0.25, least=0, most=1)
  init_from: str = ""
  linear_probe: bool = False
  seed: int = number(0, least=0, below=2**32)
  evaluation_batch_size: int = number(512, least=1, most=MAX_BATCH)
  evaluate_every: str = "1 epoch"
  checkpoint_every: str = "10 minutes"
  local_checkpoint_dir: str = ""
  log_every: str = "50 steps"
  keep_last: int = number(2, least=1, most=MAX_KEPT)

  def checkpoint_interval(self) -> Interval | None:
    """Parses `checkpoint_every`; returns None where it is empty.

    Raises:
      TrainingError: it is not an interval.
    """
    if not self.checkpoint_every:
      return None
    return self._interval("checkpoint_every", ("minutes", "epochs", "steps"))

  def _interval(
    self, field: str, units: Sequence[str] = ("epochs", "steps")
  ) -> Interval:
    interval = parse_interval(getattr(self, field), f"config.{field}", units)
    self.require(interval.count > 0, "config", field, "more than 0")
    return interval

  def create_task(self) -> Task:
    """Creates the task.

    Raises:
      UserError: the settings of the task do not fit the model or the data.
    """
    return self.task.create(
      self.model.build(), self.data, mesa_weight=self.mesa_weight
    )

  def validate(self, path: str = "config") -> None:
    """Checks every field.

    Raises:
      TrainingError, DataError: a field is wrong.
    """
    super().validate(path)
    self.checkpoint_interval()
    length, *_ = map(self._interval, ("length", "evaluate_every", "log_every"))
    self.require(
      self.batch_size % self.accumulation_steps == 0,
      path,
      "batch_size",
      f"a multiple of accumulation_steps={self.accumulation_steps}",
    )
    microbatch = self.batch_size // self.accumulation_steps
    self.task.check_batch(microbatch, f"{path}.task")
    optimizer = self.optimizer
    warmup = parse_interval(optimizer.warmup, f"{path}.optimizer.warmup")
    optimizer.require(
      warmup.unit != length.unit or warmup.count < length.count,
      f"{path}.optimizer",
      "warmup",
      f"shorter than length={self.length}",
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

  def set_for_evaluation(self, field: str, value: int | float) -> None:
    """Sets "image_size" or "test_crop_ratio" of `data`.

    Raises:
      TrainingError: the task's evaluation does not depend on it.
    """
    if not self.task.is_cropped:
      raise TrainingError(
        f"data.{field} has no effect on the evaluation of {self.task.kind}:"
        " config.task has the sizes of its images"
      )
    setattr(self.data, field, value)

  def _require_memory(self, path: str) -> None:
    """Checks that this host has the memory for the prefetched images."""
    hosts = jax.process_count() if jax.distributed.is_initialized() else 1
    images = max(self.batch_size, self.evaluation_batch_size) / hosts
    batches = self.data.prefetch * images * 3 * self.data.image_size**2
    needed = batches + self.data.num_workers * _WORKER_BYTES
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
      raise TrainingError(
        f"{path} needs {needed / 2**30:,.0f} GiB of memory for images, and"
        f" this host has {available / 2**30:,.0f} GiB: lower batch_size,"
        " evaluation_batch_size, data.image_size, data.prefetch or"
        " data.num_workers"
      )

  def count_steps(self, training_examples: int) -> Schedule:
    """Converts all intervals to steps.

    Args:
      training_examples: the number of records in the training split.

    Raises:
      TrainingError: there are fewer examples than a batch has, the warm-up is
        as long as the run, or there are too many steps.
    """
    epoch = training_examples // self.batch_size
    if not epoch:
      raise TrainingError(
        f"config.batch_size={self.batch_size} is larger than the"
        f" {training_examples} training images"
      )
    length = self._interval("length")
    steps = length.steps(epoch)
    warmup = parse_interval(
      self.optimizer.warmup, "config.optimizer.warmup"
    ).steps(epoch)
    log_every = self._interval("log_every").steps(epoch)
    for field, value, most in (
      ("length", steps, INT32_MAX),
      ("optimizer.warmup", warmup, steps - 1),
      ("log_every", min(log_every, steps), MAX_LOG_EVERY),
    ):
      if value > most:
        raise TrainingError(
          f"config.{field} is {value} steps (an epoch has {epoch}), but must be"
          f" at most {most}"
        )
    unit = steps // length.count
    mesa_from = int(self.mesa_start * length.count) * unit
    return Schedule(
      epoch=epoch,
      steps=steps,
      warmup=warmup,
      evaluate_every=self._interval("evaluate_every").steps(epoch),
      log_every=log_every,
      mesa_from=mesa_from if self.mesa_weight else None,
    )
