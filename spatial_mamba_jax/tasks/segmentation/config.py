"""The config of semantic segmentation."""

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

from spatial_mamba_jax.data.config import MAX_IMAGE_SIZE, DataConfig
from spatial_mamba_jax.data.sources import LABEL_MAPS
from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import MAX_WEIGHT, number
from spatial_mamba_jax.models.config import MAX_CHANNELS, ModelConfig
from spatial_mamba_jax.tasks.base import TaskConfig
from spatial_mamba_jax.tasks.images import check_channels

if TYPE_CHECKING:
  from spatial_mamba_jax.tasks.segmentation.task import Segmentation

# Most classes: labels are int16.
MAX_CLASSES = 2**15 - 1
# Largest ratio to the box.
_MAX_RATIO = 32.0


@dataclasses.dataclass
class SegmentationConfig(TaskConfig):
  """A class for each pixel.

  The defaults are the authors' recipe for ADE20K, which is mmsegmentation's for
  UPerNet (arXiv 1807.10221). `config.data.image_size` is the side of training
  crops.

  Attributes:
    num_classes: classes of the data set.
    head_channels: channels of the decode head.
    auxiliary_channels: channels of the auxiliary head, on the last stage but
      one.
    auxiliary_weight: weight of the auxiliary head's loss.
    dropout_rate: probability of dropping a channel before a head's classifier.
    statistics_group: number of images that share the statistics of a BatchNorm
      in the backbone during training; None for all images of a batch. Each of
      the authors' GPUs has 2. The heads' statistics are always over a batch.
    box: longer and shorter side of the box into which images are resized, in
      pixels. The aspect ratio is kept.
    box_ratio: least and greatest factor to the box of a training image.
    max_class_share: a crop in which one class has this share of the labelled
      pixels or more is drawn again, at most 10 times.
    distortion_probability: probability of each step of the photometric
      distortion: brightness, contrast, saturation, hue.
    test_ratios: factors to the box of the views that evaluation averages; the
      authors' six views have (0.75, 1, 1.25) and `test_flip`.
    test_flip: whether evaluation adds the mirror image of each view.
    test_window: side of the windows in which evaluation slides over an image,
      in pixels; 0 evaluates whole images.
    test_stride: distance between windows, in pixels.
  """

  kind: ClassVar[str] = "segmentation"
  is_cropped: ClassVar[bool] = False

  num_classes: int = number(150, least=1, most=MAX_CLASSES)
  head_channels: int = number(512, least=1, most=MAX_CHANNELS)
  auxiliary_channels: int = number(256, least=1, most=MAX_CHANNELS)
  auxiliary_weight: float = number(0.4, least=0, most=MAX_WEIGHT)
  dropout_rate: float = number(0.1, least=0, below=1)
  statistics_group: int | None = number(None, least=1)
  box: tuple[int, int] = number((2048, 512), least=1, most=MAX_IMAGE_SIZE)
  box_ratio: tuple[float, float] = number((0.5, 2.0), above=0, most=_MAX_RATIO)
  max_class_share: float = number(0.75, above=0, most=math.inf)
  distortion_probability: float = number(0.5, least=0, most=1)
  test_ratios: tuple[float, ...] = number((1.0,), above=0, most=_MAX_RATIO)
  test_flip: bool = False
  test_window: int = number(0, least=0, most=MAX_IMAGE_SIZE)
  test_stride: int = number(341, least=1, most=MAX_IMAGE_SIZE)

  def validate(self, path: str = "config.task") -> None:
    """Checks every value.

    Raises:
      UserError: a value is wrong; the message names the first such field.
    """
    super().validate(path)
    low, high = self.box_ratio
    self.require(low <= high, path, "box_ratio", "(low, high) with low <= high")
    self.require(bool(self.test_ratios), path, "test_ratios", "at least one")
    self.require(
      not self.test_window or self.test_stride <= self.test_window,
      path,
      "test_stride",
      f"at most test_window={self.test_window}",
    )

  def check_batch(self, size: int, path: str) -> None:
    """Checks that the groups of BatchNorm's statistics fill a batch."""
    self.require(
      size % (self.statistics_group or 1) == 0,
      path,
      "statistics_group",
      f"a divisor of batch_size / accumulation_steps = {size}, or None",
    )

  def create(
    self, model: ModelConfig, data: DataConfig, *, mesa_weight: float
  ) -> "Segmentation":
    """Creates the task; see `TaskConfig`."""
    if data.name not in LABEL_MAPS:
      raise UserError(
        f"config.data.name={data.name} has no label maps: choose from"
        f" {', '.join(LABEL_MAPS)}"
      )
    check_channels(model, data)
    if model.mixer.is_square:
      raise UserError(
        f"config.model.mixer={model.mixer.name} takes square images alone, and"
        " evaluation keeps the shapes of images: set"
        " config.model.mixer.aligned=True"
      )
    # Imported here, so that reading a config imports no training code.
    from spatial_mamba_jax.tasks.segmentation.task import Segmentation

    model = dataclasses.replace(model, num_classes=self.num_classes)
    return Segmentation(self, model, data, mesa_weight=mesa_weight)
