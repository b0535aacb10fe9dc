"""The config of classification."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.sources import LABEL_MAPS
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import FLOAT32_TINY, MAX_WEIGHT, Section, number
from spatial_mamba_jax.models.config import MAX_CLASSES, ModelConfig
from spatial_mamba_jax.tasks.base import TaskConfig
from spatial_mamba_jax.tasks.images import check_channels

if TYPE_CHECKING:
  from spatial_mamba_jax.tasks.classification.task import Classification


@dataclasses.dataclass
class MixingConfig(Section):
  """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899) of a batch.

  Attributes:
    probability: probability of mixing a batch at all.
    cutmix_probability: probability that a mixed batch gets cutmix, not mixup.
    mixup_alpha: mixup draws an image's weight from Beta(mixup_alpha,
      mixup_alpha).
    cutmix_alpha: cutmix draws the share of the area that an image keeps from
      Beta(cutmix_alpha, cutmix_alpha).
  """

  probability: float = number(1.0, least=0, most=1)
  cutmix_probability: float = number(0.5, least=0, most=1)
  mixup_alpha: float = number(0.8, least=FLOAT32_TINY, most=MAX_WEIGHT)
  cutmix_alpha: float = number(1.0, least=FLOAT32_TINY, most=MAX_WEIGHT)


@dataclasses.dataclass
class ClassificationConfig(TaskConfig):
  """One label an image.

  Attributes:
    num_classes: classes of the data set.
    mixing: mixup and cutmix.
    erasing_probability: probability of filling a box of a training image with
      noise (random erasing, arXiv 1708.04896).
    label_smoothing: share of the target spread over all classes.
  """

  kind: ClassVar[str] = "classification"

  num_classes: int = number(10, least=1, most=MAX_CLASSES)
  mixing: MixingConfig = dataclasses.field(default_factory=MixingConfig)
  erasing_probability: float = number(0.25, least=0, most=1)
  label_smoothing: float = number(0.1, least=0, below=1)

  def create(
    self, model: ModelConfig, data: DataConfig, *, mesa_weight: float
  ) -> "Classification":
    """Creates the task; see `TaskConfig`."""
    if data.name in LABEL_MAPS:
      raise UserError(
        f"config.data.name={data.name} has label maps, but classification needs"
        " one label an image: choose other data, or a segmentation config"
      )
    check_channels(model, data)
    # Imported here, so that reading a config imports no training code.
    from spatial_mamba_jax.tasks.classification.task import Classification

    model = dataclasses.replace(model, num_classes=self.num_classes)
    return Classification(self, model, data, mesa_weight=mesa_weight)
