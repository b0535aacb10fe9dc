"""The config of the data pipeline."""

import dataclasses
import importlib.util

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.fields import MAX_WEIGHT, Section, choice, number
from spatial_mamba_jax.preprocessing import MAX_IMAGE_SIZE, Preprocessing

# Sources of images with a label map each.
LABEL_MAPS = ("ade20k", "segmentation_folder", "digit_scenes")
SOURCE_NAMES = (
  *("digits", "imagenet2012", "image_folder", "synthetic"),
  *LABEL_MAPS,
)
SPLITS = ("train", "validation")
DECODERS = ("pillow", "simplejpeg")
# Largest magnitude of RandAugment's operations.
MAX_MAGNITUDE = 10.0
# Smallest share of the shorter side in evaluation's crop: the resized image
# then has 256 times the pixels of the crop.
MIN_TEST_CROP_RATIO = 1 / 16
# Greatest width / height of a crop; an image of 224 pixels has no narrower one.
MAX_CROP_RATIO = 2.0**8
# Most operations of RandAugment on an image; papers have 1 to 10.
MAX_OPERATIONS = 100
# Most worker processes, and threads in each: more than any host has cores.
MAX_WORKERS = 2**10
# Most batches that a process prefetches.
MAX_PREFETCH = 2**16
# Training images of ImageNet-1k, `imagenet2012`.
IMAGENET_IMAGES = 1_281_167
# Largest value in a label map's file, which has at most 16 bits a pixel.
MAX_STORED_LABEL = 2**16 - 1
# Most images of a split: int32 also counts those that pad an evaluation.
MAX_IMAGES = 2**30


class DataError(UserError):
  """A mistake in the data or its config; the message is one line."""


@dataclasses.dataclass
class DataConfig(Section):
  """Where images come from and how they become batches.

  The defaults are the authors' ImageNet recipe, but on the embedded digits. The
  task's config has the augmentation on the device. With label maps, it also has
  all other resizing and distortion, and the fields `crop_scale`, `crop_ratio`,
  `randaugment_*` and `test_crop_ratio` have no effect.

  Attributes:
    name: one of `SOURCE_NAMES`.
    data_dir: the TFDS directory of `digits` and `imagenet2012` (empty:
      $TFDS_DATA_DIR, else ~/tensorflow_datasets); or the root of an
      `image_folder`, which holds `train/<class>/` and `val/<class>/` or
      `validation/<class>/`; or the directory ADEChallengeData2016 of `ade20k`;
      or the root of a `segmentation_folder`, which holds `images/train/`,
      `images/val/`, their label maps `labels/train/` and `labels/val/`, and
      `classes.txt`.
    decoder: decoder of JPEG files, one of `DECODERS`; simplejpeg (the extra
      `fast`) returns the same pixels in less time.
    image_size: height and width of the images in a batch, in pixels; with label
      maps, of the training crops.
    crop_scale: least and greatest area of a training crop, as a share of the
      image's area.
    crop_ratio: least and greatest width / height of a training crop.
    flip_probability: probability of mirroring a training image left to right.
    randaugment_operations: RandAugment's operations drawn for a training image;
      each is applied with probability 1/2. 0 disables RandAugment.
    randaugment_magnitude: mean magnitude of these operations, from 0 to 10.
    randaugment_std: standard deviation of their magnitude.
    test_crop_ratio: share of the shorter side in evaluation's central crop: the
      shorter side is resized to `int(image_size / test_crop_ratio)`.
    num_workers: worker processes that read and decode; 0 uses threads of the
      main process.
    num_threads: threads that read and decode, in each of these processes.
    prefetch: batches that each of these processes prefetches.
    ignored_label: value of the pixels without a class in the label maps of a
      `segmentation_folder`.
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
  ignored_label: int = number(255, least=0, most=MAX_STORED_LABEL)
  max_unreadable_share: float = number(0.001, least=0, below=1)
  synthetic_images: int = number(1024, least=1, most=MAX_IMAGES)
  synthetic_classes: int = number(1000, least=1)

  @property
  def preprocessing(self) -> Preprocessing:
    """What evaluation does with an image, unless the task does it."""
    return Preprocessing(
      image_size=self.image_size,
      short_side=int(self.image_size / self.test_crop_ratio),
    )

  def validate(self, path: str = "config.data") -> None:
    """Checks every value.

    Raises:
      DataError: a value is wrong; the message names the first such field.
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
        f" {self.decoder}, or use pillow"
      )


def _is_installed(package: str) -> bool:
  try:
    return importlib.util.find_spec(package) is not None
  except ValueError:  # `sys.modules` has a module without a spec.
    return False
