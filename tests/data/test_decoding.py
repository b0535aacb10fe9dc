"""Every kind of file that Pillow reads, and what is refused."""

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data import decoding
from spatial_mamba_jax.data.image_folder import EXTENSIONS

RAMP = np.tile(np.linspace(0, 1, 256), (16, 1))


def encode(
  image: Image.Image | np.ndarray, file_format: str, **options
) -> bytes:
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  encoded = io.BytesIO()
  image.save(encoded, file_format, **options)
  return encoded.getvalue()


def tiff(values: bytes, width: int, height: int, **tags) -> bytes:
  """Writes a TIFF file of one strip; Pillow does not write all kinds."""
  numbers = {
    256: width, 257: height, 258: tags.get("bits", 16), 259: 1,
    262: tags.get("photometric", 1), 273: 0, 277: 1, 278: height,
    279: len(values), 339: tags.get("sample_format", 1),
  }  # fmt: skip
  numbers[273] = 8 + 2 + 12 * len(numbers) + 4
  entries = b"".join(
    struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items()
  )
  header = b"II*\0" + struct.pack("<IH", 8, len(numbers))
  return header + entries + bytes(4) + values


def pack_12_bits(values: np.ndarray) -> bytes:
  first, second = values[:, 0::2], values[:, 1::2]
  parts = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
  return np.stack(parts, axis=-1).astype(np.uint8).tobytes()


DEEP = {
  "uint16": encode((RAMP * 65535).astype(np.uint16), "TIFF"),
  "uint16 PNG": encode((RAMP * 65535).astype(np.uint16), "PNG"),
  "uint16 JPEG 2000": encode((RAMP * 65535).astype(np.uint16), "JPEG2000"),
  "uint12": tiff(pack_12_bits((RAMP * 4095).astype(int)), 256, 16, bits=12),
  "int16": tiff(
    (RAMP * 65535 - 32768).astype("<i2").tobytes(), 256, 16, sample_format=2
  ),
  "int32 to 255": encode((RAMP * 255).astype(np.int32), "TIFF"),
  "int32, some negative": encode((RAMP * 9e6 - 3e6).astype(np.int32), "TIFF"),
  "uint32": tiff(
    (RAMP * (2**32 - 1)).astype("<u4").tobytes(), 256, 16, bits=32
  ),
  "float to 1": encode(RAMP.astype(np.float32), "TIFF"),
  "float to 65535": encode((RAMP * 65535).astype(np.float32), "TIFF"),
  "float around 0": encode((RAMP * 1e-9 - 5e-10).astype(np.float32), "TIFF"),
  "PFM": b"Pf\n256 16\n-1.0\n" + RAMP.astype("<f4").tobytes(),
  "PGM of 12 bits": b"P5\n256 16\n4095\n"
  + (RAMP * 4095).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pixels_keep_their_picture(kind):
  pixels = np.asarray(decoding.decode_image(DEEP[kind]))
  expected = np.repeat(RAMP[:, :, None] * 255, 3, axis=2)
  # 12-bit values are rounded or truncated to 8 bits.
  np.testing.assert_allclose(pixels, expected, atol=1.1)


@pytest.mark.parametrize(
  ("bits", "sample_format", "dtype"), [(16, 1, "<u2"), (32, 3, "<f4")]
)
def test_white_may_be_zero(bits, sample_format, dtype):
  values = (RAMP * 65535).astype(dtype).tobytes()
  tags = {"bits": bits, "sample_format": sample_format}
  one, zero = (
    np.asarray(
      decoding.decode_image(tiff(values, 256, 16, photometric=p, **tags))
    )
    for p in (1, 0)
  )
  np.testing.assert_array_equal(zero, 255 - one)


def test_nan_pixels():
  values = np.array([[np.nan, -np.inf, 2, 3, 4, np.inf]], np.float32)
  pixels = np.asarray(decoding.decode_image(encode(values, "TIFF")))
  assert pixels[0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]
  with pytest.raises(ValueError, match="no pixel has a finite value"):
    decoding.decode_image(encode(values[:, :2], "TIFF"))
  same = np.asarray(decoding.decode_image(encode(values[:, 2:3], "TIFF")))
  assert same.tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(
  ("lab", "rgb"),
  # Lightness in 255ths, a and b from 128: white, black and pure red.
  [
    ((255, 128, 128), (255, 255, 255)),
    ((0, 128, 128), (0, 0, 0)),
    ((136, 208, 195), (255, 0, 0)),
  ],
)
def test_lab(lab, rgb):
  encoded = encode(Image.new("LAB", (4, 4), lab), "TIFF")
  pixels = np.asarray(decoding.decode_image(encoded))
  np.testing.assert_allclose(pixels, np.broadcast_to(rgb, (4, 4, 3)), atol=20)


@pytest.mark.parametrize(
  ("mode", "colour", "file_format", "options"),
  [
    ("RGB", (200, 100, 50), "AVIF", {}),
    ("RGB", (200, 100, 50), "BMP", {}),
    ("RGB", (200, 100, 50), "JPEG2000", {}),
    ("RGB", (200, 100, 50), "MPO", {}),
    ("RGBA", (200, 100, 50, 0), "TIFF", {}),
    ("P", 1, "GIF", {"transparency": 1}),
    ("P", 1, "TIFF", {}),
  ],
)
def test_formats(mode, colour, file_format, options):
  image = Image.new(mode, (16, 16), colour)
  if mode == "P":
    image.putpalette([0, 0, 0, 200, 100, 50])
  pixels = np.asarray(
    decoding.decode_image(encode(image, file_format, **options))
  )
  expected = np.broadcast_to((200, 100, 50), (16, 16, 3))
  np.testing.assert_allclose(pixels, expected, atol=3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_is_taken(file_format):
  frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (250, 20)]
  options = {"save_all": True, "append_images": frames[1:]}
  if file_format == "WEBP":
    options["lossless"] = True
  pixels = decoding.decode_image(encode(frames[0], file_format, **options))
  assert (np.asarray(pixels) == (250, 0, 0)).all()


def test_every_suffix_is_pillows_of_that_format():
  Image.init()
  pillows = Image.registered_extensions()
  for file_format, suffixes in decoding.FORMATS.items():
    for suffix in set(suffixes) - {".dib"}:  # BMP files use it too.
      assert pillows[suffix] == file_format
  assert {".jfif", ".jpe", ".avif", ".gif", ".jp2", ".pnm"} < set(EXTENSIONS)
  assert set(decoding.FORMATS).isdisjoint({"EPS", "WMF", "TGA"})


@pytest.mark.parametrize(
  "encoded",
  [
    np.zeros((4, 4), np.uint8),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((4, 4, 3), np.float32),
    np.zeros((0, 4, 3), np.uint8),
    "text",
    None,
    [1, 2, 3],
  ],
)
def test_a_file_without_an_image_is_refused(encoded):
  with pytest.raises((TypeError, ValueError), match="must be"):
    decoding.decode_image(encoded)


@pytest.mark.parametrize("kind", ["L", "RGB", "float32", "pixels", "file"])
def test_memory_has_a_bound(monkeypatch, tmp_path, kind):
  def read(height):
    if kind == "float32":
      encoded = encode(np.zeros((height, 100), np.float32), "TIFF")
    elif kind == "pixels":
      encoded = np.zeros((height, 100, 3), np.uint8)
    elif kind == "file":
      path = tmp_path / "image.bmp"
      path.write_bytes(encode(Image.new("RGB", (100, height)), "BMP"))
      encoded = decoding.read_image(path)
    else:
      encoded = encode(Image.new(kind, (100, height)), "PNG")
    return decoding.decode_image(encoded)

  # 408 bytes a row, as Pillow has it; 1,608 while floats are scaled.
  monkeypatch.setattr(decoding, "MAX_BYTES", 408 * 200)
  few = 50 if kind == "float32" else 200
  assert read(few).size == (100, few)
  with pytest.raises(ValueError, match=r"bytes of memory, more than 81,600"):
    read(few + 72)


class TestBothDecoders:
  """simplejpeg accepts and decodes exactly what Pillow does."""

  def files(self) -> list[bytes]:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    image = small.resize((50, 37))
    return [
      encode(image, "JPEG", quality=80),
      encode(image, "JPEG", subsampling=0, optimize=True),
      encode(image, "JPEG", progressive=True),
      encode(image, "JPEG", restart_marker_blocks=2),
      encode(image, "JPEG", keep_rgb=True),
      encode(image.convert("L"), "JPEG"),
      encode(image.convert("CMYK"), "JPEG"),
    ]

  def read(self, encoded: bytes, decoder: str) -> np.ndarray | None:
    try:
      return np.asarray(decoding.decode_image(encoded, decoder))
    except Exception:
      return None

  def compare(self, encoded: bytes) -> bool:
    """Whether both read it; fails where they differ."""
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # Of damaged metadata.
      pillow, other = (
        self.read(encoded, decoder) for decoder in ("pillow", "simplejpeg")
      )
    assert (pillow is None) == (other is None)
    if pillow is not None:
      np.testing.assert_array_equal(other, pillow)
    return pillow is not None

  def test_known_oddities(self):
    whole = self.files()[0]

    def after_start(marker: int, content: bytes) -> bytes:
      length = (len(content) + 2).to_bytes(2, "big")
      return whole[:2] + bytes((0xFF, marker)) + length + content + whole[2:]

    assert self.compare(whole[:-2] + b"\x12" * 50 + whole[-2:])
    assert self.compare(whole + bytes(100))
    assert self.compare(whole[:11] + b"\0\0" + whole[13:])  # A JFIF revision.
    assert self.compare(after_start(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"))
    for transform in (0, 1, 2, 7):
      adobe = b"Adobe\0\x64\0\0\0\0" + bytes((transform,))
      assert self.compare(after_start(0xEE, adobe))
    assert not self.compare(whole[:-30])

  def test_mutated_files(self):
    rng = np.random.default_rng(0)
    readable = 0
    files, count = self.files(), 350
    for i in range(count):
      mutated = bytearray(files[i % len(files)])
      place = int(rng.integers(2, len(mutated) - 8))
      match i % 5:
        case 0:
          mutated[place] ^= 1 << rng.integers(8)
        case 1:
          mutated[place : place + 3] = rng.bytes(3)
        case 2:
          del mutated[place:]
        case 3:
          mutated[place:place] = rng.bytes(int(rng.integers(1, 20)))
        case 4:
          del mutated[place : place + int(rng.integers(1, 8))]
      readable += self.compare(bytes(mutated))
    # The set must try both.
    assert 0.3 * count < readable < 0.9 * count


class TestUpright:
  """The image "F" as each EXIF orientation stores it."""

  UPRIGHT = np.kron(
    [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]], np.ones((8, 8))
  )
  # By orientation, from EXIF's definition: which of the upright image's edges
  # are the stored first row and the stored first column.
  STORED = (
    *(lambda x: x, lambda x: x[:, ::-1], lambda x: x[::-1, ::-1]),
    *(lambda x: x[::-1], lambda x: x.T, lambda x: x.T[::-1]),
    *(lambda x: x.T[::-1, ::-1], lambda x: x.T[:, ::-1]),
  )

  def encode(self, orientation: int, file_format: str) -> bytes:
    stored = self.STORED[orientation - 1](self.UPRIGHT)
    pixels = np.repeat(stored[..., None] * 255, 3, -1).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    return encode(np.ascontiguousarray(pixels), file_format, exif=exif)

  @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
  @pytest.mark.parametrize("orientation", range(1, 9))
  def test_every_orientation(self, tmp_path, orientation, file_format):
    encoded = self.encode(orientation, file_format)
    image = decoding.decode_upright(encoded)
    assert image.size == (24, 32)
    difference = np.asarray(image)[..., 0] / 255 - self.UPRIGHT
    assert np.abs(difference).mean() < 0.05
    path = tmp_path / "image"
    path.write_bytes(encoded)
    assert decoding.read_upright_size(path) == (32, 24)

  def test_by_the_other_decoder(self):
    encoded = self.encode(6, "JPEG")
    np.testing.assert_array_equal(
      *(
        np.asarray(decoding.decode_upright(encoded, x))
        for x in ("pillow", "simplejpeg")
      )
    )

  @pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
  def test_broken_or_odd_metadata_changes_nothing(self):
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff"):
      encoded = encode(Image.new("RGB", (3, 5)), "JPEG", exif=exif)
      assert decoding.decode_upright(encoded).size == (3, 5)

  def test_pixels_stay_as_they_are(self):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    image = decoding.decode_upright(pixels)
    np.testing.assert_array_equal(np.asarray(image), pixels)

  def test_only_the_header_is_read(self, tmp_path):
    path = tmp_path / "image"
    noise = np.random.default_rng(0).integers(0, 256, (99, 70, 3), np.uint8)
    path.write_bytes(encode(noise, "PNG")[:200])
    assert decoding.read_upright_size(path) == (99, 70)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not an image of a known format"):
      decoding.read_upright_size(path)
