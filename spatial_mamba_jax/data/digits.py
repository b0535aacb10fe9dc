"""The 1,797 handwritten 8x8 digits that come with scikit-learn."""

import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

from spatial_mamba_jax.data import tfds_source
from spatial_mamba_jax.data.config import SPLITS, DataConfig
from spatial_mamba_jax.data.digit_images import load_digits, split_indices

with registered.skip_registration():

  class Digits(tfds.core.GeneratorBasedBuilder):
    """Test part of the UCI Optical Recognition of Handwritten Digits set."""

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
      return {
        split: self._generate_examples(split_indices(split)) for split in SPLITS
      }

    def _generate_examples(
      self, indices: np.ndarray
    ) -> Iterator[tuple[str, dict[str, Any]]]:
      digits = load_digits()
      for index in indices:
        pixels = np.round(digits.ink[index] * 255).astype(np.uint8)
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG")
        file_name = f"digit_{index:04d}.png"
        # Bytes, because TFDS would encode pixels with TensorFlow.
        yield (
          file_name,
          {
            "image": encoded.getvalue(),
            "label": int(digits.labels[index]),
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
