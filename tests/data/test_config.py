"""The fields of `DataConfig`."""

import pytest

from spatial_mamba_jax.data import DataConfig, DataError


def test_defaults_are_valid():
  DataConfig().validate()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("name", "cifar"),
    ("decoder", "turbo"),
    ("image_size", 0),
    ("crop_scale", (0.0, 1.0)),
    ("crop_scale", (0.5, 0.4)),
    ("crop_scale", (0.5, 1.1)),
    ("crop_scale", (0.5,)),
    ("crop_ratio", (0.0, 1.0)),
    ("crop_ratio", (2.0, 1.0)),
    ("flip_probability", 1.5),
    ("flip_probability", float("nan")),
    ("crop_ratio", (1e-3, 1.0)),
    ("randaugment_operations", -1),
    ("randaugment_operations", 10**6),
    ("randaugment_magnitude", 10.5),
    ("randaugment_std", -0.5),
    ("randaugment_std", float("inf")),
    ("test_crop_ratio", 0.0),
    ("test_crop_ratio", 1.1),
    ("test_crop_ratio", 1e-9),
    ("image_size", 10**20),
    ("num_workers", -1),
    ("num_workers", 10**4),
    ("num_threads", 0),
    ("prefetch", 1),
    ("max_unreadable_share", 1.0),
    ("max_unreadable_share", -0.1),
    ("prefetch", 10**6),
    ("synthetic_images", 0),
    ("synthetic_images", 2**31),
    ("synthetic_classes", 0),
  ],
)
def test_wrong_values_end_in_one_line_that_names_them(field, value):
  config = DataConfig()
  setattr(config, field, value)  # An override on the command line does this.
  with pytest.raises(DataError) as caught:
    config.validate()
  message = str(caught.value)
  assert message.startswith(f"config.data.{field} must be ")
  assert message.endswith(f"got {value!r}")
  assert "\n" not in message


def test_the_least_prefetch_depends_on_the_threads():
  DataConfig(num_threads=3, prefetch=3).validate()
  with pytest.raises(DataError, match="num_threads=4"):
    DataConfig(num_threads=4, prefetch=3).validate()


def test_a_decoder_that_is_not_installed(monkeypatch):
  DataConfig(decoder="simplejpeg").validate()
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(DataError, match="pip install simplejpeg"):
    DataConfig(decoder="simplejpeg").validate()
