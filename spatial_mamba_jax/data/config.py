"""What the data pipeline can be told."""

import dataclasses
import importlib.util
import math

from spatial_mamba_jax.errors import UserError

SOURCE_NAMES = ("digits", "imagenet2012", "image_folder", "synthetic")
SPLITS = ("train", "validation")
DECODERS = ("pillow", "simplejpeg")
MAX_MAGNITUDE = 10.0  # Of RandAugment.
# Means and deviations over ImageNet's pixels, by channel, on the scale 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DataError(UserError):
  """A mistake in the data or its settings, told in one line."""


@dataclasses.dataclass
class DataConfig:
  """Where images come from and how they become batches.

  The defaults are the authors' ImageNet recipe, on the embedded digits; what it
  does to batches on the device is in the training config.

  Attributes:
    name: one of `SOURCE_NAMES`.
    data_dir: the TFDS directory of `digits` and `imagenet2012` (empty:
      $TFDS_DATA_DIR, else ~/tensorflow_datasets), or the root of an
      `image_folder`, which holds `train/<class>/` and `val/<class>/` or
      `validation/<class>/`.
    decoder: of JPEG files, one of `DECODERS`; simplejpeg (the extra `fast`)
      gives the same pixels in less time.
    image_size: height and width of the images in a batch, in pixels.
    crop_scale: least and greatest area of a training crop, as a share of the
      image's area.
    crop_ratio: least and greatest width / height of a training crop.
    flip_probability: probability of mirroring a training image left to right.
    randaugment_operations: RandAugment's operations drawn for a training image,
      each of which is applied with probability 1/2; 0 for no RandAugment.
    randaugment_magnitude: mean strength of these, from 0 to 10.
    randaugment_std: standard deviation of their strength.
    test_crop_ratio: share of the shorter side that the central crop takes in
      evaluation: the shorter side is resized to
      `int(image_size / test_crop_ratio)`.
    num_workers: processes that read and decode; 0 leaves this to threads.
    num_threads: threads that read and decode, in each of these processes.
    prefetch: batches kept ready in each of these processes.
    max_unreadable_share: largest tolerated share of unreadable images.
    synthetic_images: number of images in each split of `synthetic`.
    synthetic_classes: number of classes of `synthetic`.
  """

  name: str = "digits"
  data_dir: str = ""
  decoder: str = "pillow"
  image_size: int = 224
  crop_scale: tuple[float, float] = (0.08, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip_probability: float = 0.5
  randaugment_operations: int = 2
  randaugment_magnitude: float = 9.0
  randaugment_std: float = 0.5
  test_crop_ratio: float = 224 / 256
  num_workers: int = 0
  num_threads: int = 2
  prefetch: int = 4
  max_unreadable_share: float = 0.001
  synthetic_images: int = 1024
  synthetic_classes: int = 1000

  def validate(self) -> None:
    """Checks every value.

    Raises:
      DataError: naming the first field whose value makes no sense.
    """
    for field, accepted, requirement in (
      ("name", self.name in SOURCE_NAMES, f"one of {', '.join(SOURCE_NAMES)}"),
      ("decoder", self.decoder in DECODERS, f"one of {', '.join(DECODERS)}"),
      ("image_size", self.image_size >= 1, "at least 1"),
      (
        "crop_scale",
        _is_range(self.crop_scale) and self.crop_scale[1] <= 1,
        "(low, high) with 0 < low <= high <= 1",
      ),
      (
        "crop_ratio",
        _is_range(self.crop_ratio),
        "(low, high) with 0 < low <= high",
      ),
      ("flip_probability", 0 <= self.flip_probability <= 1, "within [0, 1]"),
      (
        "randaugment_operations",
        self.randaugment_operations >= 0,
        "at least 0",
      ),
      (
        "randaugment_magnitude",
        0 <= self.randaugment_magnitude <= MAX_MAGNITUDE,
        f"within [0, {MAX_MAGNITUDE:.0f}]",
      ),
      ("randaugment_std", 0 <= self.randaugment_std < math.inf, "at least 0"),
      ("test_crop_ratio", 0 < self.test_crop_ratio <= 1, "within (0, 1]"),
      ("num_workers", self.num_workers >= 0, "at least 0"),
      ("num_threads", self.num_threads >= 1, "at least 1"),
      (
        "prefetch",
        self.prefetch >= self.num_threads,
        f"at least num_threads={self.num_threads}",
      ),
      (
        "max_unreadable_share",
        0 <= self.max_unreadable_share < 1,
        "within [0, 1)",
      ),
      ("synthetic_images", self.synthetic_images >= 1, "at least 1"),
      ("synthetic_classes", self.synthetic_classes >= 1, "at least 1"),
    ):
      if not accepted:
        raise DataError(
          f"data.{field} must be {requirement}, got {getattr(self, field)!r}"
        )
    if self.decoder != "pillow" and not importlib.util.find_spec(self.decoder):
      raise DataError(
        f"data.decoder={self.decoder} is not installed: pip install"
        f" {self.decoder}, or leave it to pillow"
      )


def _is_range(bounds: tuple[float, ...]) -> bool:
  return len(bounds) == 2 and 0 < bounds[0] <= bounds[1]
