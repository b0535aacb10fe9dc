"""What `open_source` refuses."""

import pytest

from spatial_mamba_jax.data import DataConfig, DataError, open_source


def test_unknown_split():
  with pytest.raises(DataError, match=r"one of train, validation, got 'test'"):
    open_source(DataConfig(), "test")


def test_settings_are_checked_first():
  with pytest.raises(DataError, match=r"data\.name must be one of digits, "):
    open_source(DataConfig(name="mnist"), "train")
