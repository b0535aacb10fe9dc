"""Examples of images with one label each."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from spatial_mamba_jax.data import transforms
from spatial_mamba_jax.data.config import DataConfig
from spatial_mamba_jax.data.examples import WrongRecordError


class LabelledImage(NamedTuple):
  """A decoded image and its class."""

  image: Image.Image
  label: int


@dataclasses.dataclass(frozen=True)
class LabelledImages:
  """Turns records into {"image": uint8 [H, W, 3], "label": int32}.

  H and W are `config.image_size`. It implements `Examples`.

  Attributes:
    num_classes: number of classes; labels are integers below it.
    config: the config of the transforms.
  """

  num_classes: int
  config: DataConfig

  def read(self, record: Mapping[str, Any]) -> LabelledImage:
    """Decodes an image.

    Raises:
      WrongRecordError: the label is not a class.
    """
    label = self._label(record.get("label"))
    image = transforms.decode_image(record["image"], self.config.decoder)
    return LabelledImage(image, label)

  def train(
    self, decoded: LabelledImage, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    """Crops, mirrors and distorts the image at random."""
    pixels = transforms.transform_for_training(decoded.image, self.config, rng)
    return _example(pixels, decoded.label)

  def evaluate(self, decoded: LabelledImage) -> dict[str, np.ndarray]:
    """Resizes the image and takes its centre."""
    pixels = transforms.transform_for_evaluation(
      decoded.image, self.config.preprocessing
    )
    return _example(pixels, decoded.label)

  def blank(self, *, train: bool) -> dict[str, np.ndarray]:
    """Returns a black image of label 0."""
    del train  # Both have the same size.
    size = self.config.image_size
    return _example(np.zeros((size, size, 3), np.uint8), 0)

  def _label(self, label: Any) -> int:
    try:
      number = operator.index(label)
    except TypeError:
      number = -1
    if not 0 <= number < self.num_classes:
      raise WrongRecordError(
        f"its label is {label!r}, but labels of {self.num_classes} classes are "
        f"integers from 0 to {self.num_classes - 1}"
      )
    return number


def _example(pixels: np.ndarray, label: int) -> dict[str, np.ndarray]:
  return {"image": pixels, "label": np.asarray(label, np.int32)}
