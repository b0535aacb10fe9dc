"""Decoding, crops and resizing."""

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from spatial_mamba_jax.data import DataConfig, transforms
from spatial_mamba_jax.preprocessing import Preprocessing


def encode(image: Image.Image, file_format: str, **options) -> bytes:
  encoded = io.BytesIO()
  image.save(encoded, file_format, **options)
  return encoded.getvalue()


class Draws(np.random.Generator):
  """Stands in for a generator; returns the given draws in order."""

  def __init__(self, uniform, integers=(), random=()):
    super().__init__(np.random.PCG64())
    self._draws = {"uniform": uniform, "integers": integers, "random": random}
    self._draws = {name: iter(draws) for name, draws in self._draws.items()}
    self.upper_bounds = []

  def uniform(self, low, high):
    return low + (high - low) * next(self._draws["uniform"])

  def integers(self, high, size=None):
    if size == 0:  # RandAugment is off.
      return ()
    self.upper_bounds.append(high)
    return next(self._draws["integers"])

  def random(self):
    return next(self._draws["random"])


class TestDecodeImage:
  # The colour in each mode and what it should become. JPEG may be off by two,
  # after rounding in YCbCr and in RGB.
  @pytest.mark.parametrize(
    ("mode", "colour", "file_format", "expected", "tolerance"),
    [
      ("RGB", (200, 100, 50), "PNG", (200, 100, 50), 0),
      ("RGB", (200, 100, 50), "WEBP", (200, 100, 50), 3),
      ("RGB", (200, 100, 50), "JPEG", (200, 100, 50), 2),
      ("L", 77, "JPEG", (77, 77, 77), 2),
      ("CMYK", (0, 128, 255, 0), "JPEG", (255, 127, 0), 2),
      ("CMYK", (0, 0, 0, 255), "JPEG", (0, 0, 0), 2),
      ("1", 1, "PNG", (255, 255, 255), 0),
      ("LA", (77, 128), "PNG", (77, 77, 77), 0),
      ("RGBA", (200, 100, 50, 0), "PNG", (200, 100, 50), 0),
      ("I;16", 0x4D80, "PNG", (0x4D, 0x4D, 0x4D), 0),
      ("I;16", 0xFFFF, "PNG", (255, 255, 255), 0),
      ("I;16B", 0x4D80, "TIFF", (0x4D, 0x4D, 0x4D), 0),
      ("I", 0x4D80, "PPM", (0x4D, 0x4D, 0x4D), 0),
    ],
  )
  def test_every_mode_becomes_rgb(
    self, mode, colour, file_format, expected, tolerance
  ):
    encoded = encode(Image.new(mode, (9, 7), colour), file_format)
    pixels = np.asarray(transforms.decode_image(encoded))
    assert pixels.shape == (7, 9, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(
      pixels, np.broadcast_to(expected, (7, 9, 3)), atol=tolerance
    )

  def test_palette_with_transparency(self):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    encoded = encode(image, "PNG", transparency=bytes([255, 0]))
    transforms_pixels = np.asarray(transforms.decode_image(encoded))
    assert (transforms_pixels == (200, 100, 50)).all()

  def test_exif_orientation_is_not_applied(self):
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees to see it upright.
    encoded = encode(Image.new("RGB", (9, 7)), "JPEG", exif=exif)
    assert transforms.decode_image(encoded).size == (9, 7)

  def test_pixels_stay_as_they_are(self):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    decoded = np.asarray(transforms.decode_image(pixels))
    np.testing.assert_array_equal(decoded, pixels)

  @pytest.mark.parametrize(
    ("encoded", "message"),
    [
      (b"", "empty file"),
      (b"<html></html>", "not an image of a known format"),
      (encode(Image.new("RGB", (64, 64)), "JPEG")[:-20], "truncated"),
    ],
  )
  def test_broken_files_say_what_is_wrong(self, encoded, message):
    with pytest.raises((OSError, ValueError), match=message):
      transforms.decode_image(encoded)


def photo(width, height, mode="RGB"):
  """Edges and noise, so that every step of a decoder shows."""
  rng = np.random.default_rng(0)
  coarse = rng.integers(0, 256, (9, 9, 3), np.uint8)
  smooth = np.asarray(Image.fromarray(coarse).resize((width, height)))
  noisy = smooth + rng.normal(0, 20, smooth.shape)
  return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


class TestSimplejpeg:
  @pytest.mark.parametrize("size", [(64, 48), (37, 53), (1, 1)])
  @pytest.mark.parametrize(
    ("mode", "options"),
    [
      ("RGB", {"subsampling": 0}),
      ("RGB", {"subsampling": 1}),
      ("RGB", {"subsampling": 2, "quality": 40}),
      ("RGB", {"progressive": True}),
      ("RGB", {"keep_rgb": True}),
      ("L", {}),
      ("CMYK", {}),
    ],
  )
  def test_pixels_are_pillows(self, size, mode, options):
    encoded = encode(photo(*size, mode), "JPEG", **options)
    ours = transforms.decode_image(encoded, "simplejpeg")
    theirs = transforms.decode_image(encoded)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))

  def test_it_is_what_decodes(self, monkeypatch):
    encoded = encode(photo(8, 8), "JPEG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert transforms.decode_image(encoded, "simplejpeg").size == (8, 8)

  def test_other_formats_are_left_to_pillow(self):
    image = photo(9, 7)
    decoded = transforms.decode_image(encode(image, "PNG"), "simplejpeg")
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))

  @pytest.mark.parametrize("kept", [3, 30, -20])
  def test_truncated_files_raise(self, kept):
    encoded = encode(photo(64, 64), "JPEG")[:kept]
    with pytest.raises((KeyError, OSError, ValueError)):
      transforms.decode_image(encoded, "simplejpeg")


class TestSampleCrop:
  def test_first_fitting_draw(self):
    # Half of 100 x 50 with aspect ratio 1 is 50 x 50.
    draws = Draws(uniform=[0.5, 0.5], integers=[20, 0])
    box = transforms.sample_crop(
      100, 50, scale=(0.0, 1.0), ratio=(1 / 2, 2.0), rng=draws
    )
    assert box == (20, 0, 70, 50)
    assert draws.upper_bounds == [51, 1]

  def test_draws_again_until_it_fits(self):
    # All of 100 x 50 as a square is 71 x 71, which is too high; a quarter of
    # it at aspect ratio 2 is 50 x 25.
    draws = Draws(uniform=[1.0, 0.5, 0.25, 1.0], integers=[50, 25])
    box = transforms.sample_crop(
      100, 50, scale=(0.0, 1.0), ratio=(1 / 2, 2.0), rng=draws
    )
    assert box == (50, 25, 100, 50)
    assert draws.upper_bounds == [51, 26]

  # Too elongated to hold any draw, so that ten fail and the centre is taken.
  @pytest.mark.parametrize(
    ("width", "height", "box"),
    [
      (1000, 30, (480, 0, 520, 30)),  # 40 x 30 is 4/3.
      (30, 1000, (0, 480, 30, 520)),  # 30 x 40 is 3/4.
    ],
  )
  def test_falls_back_to_the_centre(self, width, height, box):
    draws = Draws(uniform=[1.0, 0.5] * 10)
    assert box == transforms.sample_crop(
      width, height, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), rng=draws
    )

  def test_falls_back_to_the_whole_image(self):
    draws = Draws(uniform=[1.0, 1.0] * 10)
    assert transforms.sample_crop(
      50, 50, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3), rng=draws
    ) == (0, 0, 50, 50)

  def test_the_tiniest_image(self):
    rng = np.random.default_rng(0)
    for _ in range(20):
      assert transforms.sample_crop(
        1, 1, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), rng=rng
      ) == (0, 0, 1, 1)

  def test_distributions(self):
    # So small that every draw fits and nothing is rejected; so large an image
    # that rounding to pixels moves a share by less than 1e-3.
    size, count = 10_000, 4000
    rng = np.random.default_rng(0)
    crops = np.array(
      [
        transforms.sample_crop(
          size, size, scale=(0.1, 0.3), ratio=(1 / 2, 2.0), rng=rng
        )
        for _ in range(count)
      ]
    )
    left, top = crops[:, 0], crops[:, 1]
    width, height = crops[:, 2] - left, crops[:, 3] - top
    for uniform in (
      (width * height / size**2 - 0.1) / 0.2,
      (np.log(width / height) + math.log(2)) / math.log(4),
      left / (size - width),
      top / (size - height),
    ):
      # Kolmogorov-Smirnov at the 1% level; the seed is fixed.
      ranks = np.arange(1, count + 1) / count
      distance = np.abs(np.sort(uniform) - ranks).max()
      assert distance < 1.63 / math.sqrt(count) + 1e-3


def reduce_rows(pixels: np.ndarray, new: int) -> np.ndarray:
  """Resizes the first axis to fewer rows, bicubic, rounded to 8 bits."""
  old = len(pixels)
  scale = old / new
  rows = []
  for i in range(new):
    centre = (i + 0.5) * scale
    x = np.abs((np.arange(old) + 0.5 - centre) / scale)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - x / 2) * x - 4) * x + 2
    weight = np.where(x < 1, near, np.where(x < 2, far, 0))
    rows.append(np.tensordot(weight / weight.sum(), pixels, 1))
  return np.clip(np.floor(np.array(rows) + 0.5), 0, 255)


class TestTrainingTransform:
  @pytest.mark.parametrize("height", [60, 90, 400])
  def test_resizes_the_width_first(self, height):
    """As Pillow did before version 13, with 8 bits between the two passes."""
    pixels = np.random.default_rng(0).integers(
      0, 256, (height, 60, 3), np.uint8
    )
    config = DataConfig(
      image_size=32,
      crop_scale=(1.0, 1.0),
      crop_ratio=(60 / height, 60 / height),
    )
    image = Image.fromarray(pixels)
    crop = transforms.random_resized_crop(
      image, config, np.random.default_rng(0)
    )
    wide = reduce_rows(pixels.swapaxes(0, 1), 32).swapaxes(0, 1)
    difference = np.abs(reduce_rows(wide, 32) - np.asarray(crop))
    assert difference.max() <= 1  # Pillow's weights have 22 bits.
    assert (difference == 0).mean() > 0.99

  def test_crops_then_resizes(self):
    # A red square in green: no green may bleed into a crop of just the square.
    image = Image.new("RGB", (100, 50), (0, 255, 0))
    ImageDraw.Draw(image).rectangle((30, 0, 79, 49), fill=(255, 0, 0))
    config = DataConfig(
      image_size=17,
      crop_scale=(0.5, 0.5),
      crop_ratio=(1.0, 1.0),
      randaugment_operations=0,
    )
    draws = Draws(uniform=[0.5, 0.5], integers=[30, 0], random=[0.9])
    pixels = transforms.transform_for_training(image, config, draws)
    assert pixels.shape == (17, 17, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == (255, 0, 0)).all()

  @pytest.mark.parametrize("flip", [False, True])
  def test_is_bicubic_and_mirrors(self, flip):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    image = Image.fromarray(pixels)
    config = DataConfig(
      image_size=33,
      crop_scale=(1.0, 1.0),
      crop_ratio=(1.0, 1.0),
      flip_probability=0.3,
      randaugment_operations=0,
    )
    draws = Draws(
      uniform=[0.5, 0.5], integers=[0, 0], random=[0.29 if flip else 0.31]
    )
    expected = np.asarray(image.resize((33, 33), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
      transforms.transform_for_training(image, config, draws),
      expected[:, ::-1] if flip else expected,
    )


class TestEvaluationTransform:
  # By hand, from torchvision's rules: the shorter side to int(size / 0.875),
  # the longer in proportion, rounded down; offsets rounded, halves to even.
  @pytest.mark.parametrize(
    ("width", "height", "size", "resized", "left", "top"),
    [
      (500, 375, 224, (341, 256), 58, 16),  # 256 * 500 / 375 = 341.3; 58.5
      (375, 500, 224, (256, 341), 16, 58),
      (333, 500, 224, (256, 384), 16, 80),  # 256 * 500 / 333 = 384.4
      (224, 224, 224, (256, 256), 16, 16),
      (8, 8, 32, (36, 36), 2, 2),  # 36.57
      (50, 40, 33, (46, 37), 6, 2),  # 37.7; 37 * 5 / 4 = 46.25; 6.5
    ],
  )
  def test_matches_torchvision(self, width, height, size, resized, left, top):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
      transforms.transform_for_evaluation(
        image, DataConfig(image_size=size).preprocessing
      ),
      expected[top : top + size, left : left + size],
    )

  def test_crop_ratio_one_keeps_the_whole_shorter_side(self):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    preprocessing = Preprocessing(image_size=20, short_side=20)
    np.testing.assert_array_equal(
      transforms.transform_for_evaluation(
        Image.fromarray(pixels), preprocessing
      ),
      pixels,
    )

  # Pillow makes the whole of the enlarged image, and then crops it.
  @pytest.mark.parametrize("ratio", [1.0, 0.875, 0.4])
  def test_only_what_is_kept_of_thin_images(self, monkeypatch, ratio):
    rng = np.random.default_rng(0)
    for width, height, size in (
      *((1, 400, 24), (400, 1, 24), (2, 301, 33), (301, 2, 33), (3, 7, 40)),
      *((7, 3, 40), (5, 5, 31), (1, 1, 9), (16, 999, 17), (999, 16, 17)),
    ):
      pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
      image = Image.fromarray(pixels)
      config = DataConfig(image_size=size, test_crop_ratio=ratio).preprocessing
      monkeypatch.setattr(transforms, "_WHOLE_PIXELS", 2**24)
      expected = transforms.transform_for_evaluation(image, config)
      monkeypatch.setattr(transforms, "_WHOLE_PIXELS", 0)
      actual = transforms.transform_for_evaluation(image, config)
      np.testing.assert_array_equal(actual, expected)

  @pytest.mark.parametrize("size", [(1, 5_000_000), (5_000_000, 1)])
  def test_the_thinnest_images(self, size):
    # Its middle is red, and would be 256 x 1,280,000,000 pixels large.
    image = Image.new("RGB", size)
    middle = [side // 2 for side in size]
    box = [*(m - 2 for m in middle), *(m + 2 for m in middle)]
    image.paste((255, 0, 0), (max(box[0], 0), max(box[1], 0), *box[2:]))
    pixels = transforms.transform_for_evaluation(image, Preprocessing())
    assert pixels.shape == (224, 224, 3)
    assert (pixels == (255, 0, 0)).all()


def test_resizing_has_a_bound():
  # An image of 8 MB of which all is a crop: its rows, resized, would be 8 GB.
  image = Image.new("RGB", (1, 2_000_000))
  config = DataConfig(
    image_size=1000, crop_scale=(1.0, 1.0), crop_ratio=(1e-7, 1e-6)
  )
  with pytest.raises(ValueError, match="bytes of memory, more than"):
    transforms.transform_for_training(image, config, np.random.default_rng(0))
