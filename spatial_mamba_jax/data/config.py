"""What the data pipeline can be told."""

import dataclasses
import importlib.util

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import MAX_WEIGHT, Section, choice, number

SOURCE_NAMES = ("digits", "imagenet2012", "image_folder", "synthetic")
SPLITS = ("train", "validation")
DECODERS = ("pillow", "simplejpeg")
MAX_MAGNITUDE = 10.0  # Of RandAugment.
# Means and deviations over ImageNet's pixels, by channel, on the scale 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pixels of a side: an image of them takes 0.8 GB, and a scan over its tokens
# counts them in int32.
MAX_IMAGE_SIZE = 2**14
# Smallest share of the shorter side that evaluation takes: the resized image
# then has 256 times the pixels of the crop.
MIN_TEST_CROP_RATIO = 1 / 16
# Greatest width / height of a crop; an image of 224 pixels has no narrower one.
MAX_CROP_RATIO = 2.0**8
# Operations of RandAugment on an image, one after another; papers have 1 to 10.
MAX_OPERATIONS = 100
# Processes that read, and threads in each: more than the cores of any host.
MAX_WORKERS = 2**10
# Batches kept ready in a process.
MAX_PREFETCH = 2**16
# Images of a split, so that an int32 also counts those that pad an evaluation.
MAX_IMAGES = 2**30


class DataError(UserError):
  """A mistake in the data or its settings, told in one line."""


@dataclasses.dataclass
class DataConfig(Section):
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

  mistake = DataError

  name: str = choice("digits", among=SOURCE_NAMES)
  data_dir: str = ""
  decoder: str = choice("pillow", among=DECODERS)
  image_size: int = number(224, least=1, most=MAX_IMAGE_SIZE)
  crop_scale: tuple[float, float] = number((0.08, 1.0), above=0, most=1)
  crop_ratio: tuple[float, float] = number(
    (3 / 4, 4 / 3), least=1 / MAX_CROP_RATIO, most=MAX_CROP_RATIO
  )
  flip_probability: float = number(0.5, least=0, most=1)
  randaugment_operations: int = number(2, least=0, most=MAX_OPERATIONS)
  randaugment_magnitude: float = number(9.0, least=0, most=MAX_MAGNITUDE)
  randaugment_std: float = number(0.5, least=0, most=MAX_WEIGHT)
  test_crop_ratio: float = number(224 / 256, least=MIN_TEST_CROP_RATIO, most=1)
  num_workers: int = number(0, least=0, most=MAX_WORKERS)
  num_threads: int = number(2, least=1, most=MAX_WORKERS)
  prefetch: int = number(4, least=1, most=MAX_PREFETCH)
  max_unreadable_share: float = number(0.001, least=0, below=1)
  synthetic_images: int = number(1024, least=1, most=MAX_IMAGES)
  synthetic_classes: int = number(1000, least=1)

  def validate(self, path: str = "config.data") -> None:
    """Checks every value.

    Raises:
      DataError: naming the first field whose value makes no sense.
    """
    super().validate(path)
    for field in ("crop_scale", "crop_ratio"):
      low, high = getattr(self, field)
      self.require(low <= high, path, field, "(low, high) with low <= high")
    self.require(
      self.prefetch >= self.num_threads,
      path,
      "prefetch",
      f"at least num_threads={self.num_threads}",
    )
    if self.decoder != "pillow" and not _is_installed(self.decoder):
      raise DataError(
        f"{path}.decoder={self.decoder} is not installed: pip install"
        f" {self.decoder}, or leave it to pillow"
      )


def _is_installed(package: str) -> bool:
  try:
    return importlib.util.find_spec(package) is not None
  except ValueError:  # What stands for it was put there by hand.
    return False
