"""The handwritten digits that come with scikit-learn, and their splits."""

import functools
from typing import NamedTuple

import numpy as np
from sklearn import datasets

_NUM_VALIDATION = 297


class DigitImages(NamedTuple):
  """All 1,797 digits.

  Attributes:
    ink: ink in each pixel, from 0 to 1, [1797, 8, 8].
    labels: the digits, integers [1797].
  """

  ink: np.ndarray
  labels: np.ndarray


@functools.cache
def load_digits() -> DigitImages:
  """Loads the digits, which come with scikit-learn."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  return DigitImages(pixels.reshape(-1, 8, 8) / 16, labels)


@functools.cache
def split_indices(split: str) -> np.ndarray:
  """Returns the sorted indices of the digits in "train" or "validation".

  The set is ordered by writer. The validation images are spread evenly over it,
  so that both splits have digits of every writer.
  """
  count = len(load_digits().labels)
  held_out = np.arange(_NUM_VALIDATION) * count // _NUM_VALIDATION
  if split == "validation":
    return held_out
  return np.setdiff1d(np.arange(count), held_out)
