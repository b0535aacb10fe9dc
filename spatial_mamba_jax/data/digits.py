"""The 1,797 handwritten 8x8 digits that come with scikit-learn."""

import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets
from tensorflow_datasets.core import registered

from spatial_mamba_jax.data import tfds_source
from spatial_mamba_jax.data.config import DataConfig

_NUM_VALIDATION = 297

with registered.skip_registration():

  class Digits(tfds.core.GeneratorBasedBuilder):
    """Test part of the UCI Optical Recognition of Handwritten Digits set.

    The set is ordered by writer. The validation images are spread evenly over
    it, so that both splits have digits of every writer.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
      return self.dataset_info_from_configs(
        features=tfds.features.FeaturesDict(
          {
            "image": tfds.features.Image(
              shape=(8, 8, 1), encoding_format="png"
            ),
            "label": tfds.features.ClassLabel(num_classes=10),
            "file_name": tfds.features.Text(),
          }
        ),
        supervised_keys=("image", "label"),
        homepage="https://archive.ics.uci.edu/dataset/80",
      )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
      del dl_manager  # Nothing to download.
      _, labels = datasets.load_digits(return_X_y=True)
      count = len(labels)
      held_out = np.arange(_NUM_VALIDATION) * count // _NUM_VALIDATION
      return {
        "train": self._generate_examples(np.setdiff1d(range(count), held_out)),
        "validation": self._generate_examples(held_out),
      }

    def _generate_examples(
      self, indices: np.ndarray
    ) -> Iterator[tuple[str, dict[str, Any]]]:
      images, labels = datasets.load_digits(return_X_y=True)
      for index in indices:
        grey = images[index].reshape(8, 8) * (255 / 16)
        pixels = np.round(grey).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        file_name = f"digit_{index:04d}.png"
        # Bytes, because TFDS would encode pixels with TensorFlow.
        yield (
          file_name,
          {
            "image": encoded.getvalue(),
            "label": int(labels[index]),
            "file_name": file_name,
          },
        )


def open_split(config: DataConfig, split: str) -> tfds_source.TfdsSource:
  """Opens the digits, and prepares them first if they are missing."""
  data_dir = tfds_source.data_directory(config.data_dir)
  directory = data_dir / "digits" / str(Digits.VERSION)
  if not os.path.lexists(directory):
    tfds_source.prepare(Digits(data_dir=data_dir))
  return tfds_source.TfdsSource(
    directory,
    split,
    remedy=f"remove {directory}, and it is prepared again",
    in_memory=True,
  )
