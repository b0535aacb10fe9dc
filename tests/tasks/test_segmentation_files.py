"""Files and pictures of predicted label maps."""

import csv
import dataclasses
import io
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data.digit_scenes import DigitScenes
from spatial_mamba_jax.data.label_maps import IGNORED, make_palette
from spatial_mamba_jax.tasks.segmentation.evaluation import (
  LabelMaps,
  SegmentationMeter,
)
from spatial_mamba_jax.tasks.segmentation.pictures import Example, draw_example
from spatial_mamba_jax.tasks.segmentation.prediction_files import (
  file_stems,
  in_common_directory,
)

YELLOW, BLACK = (240, 228, 66), (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Scenes(DigitScenes):
  """Scenes of digits with names, and any number of classes."""

  split: str = "validation"
  names: tuple[str, ...] = ()
  count: int = 11
  broken: tuple[int, ...] = ()
  read: list[int] = dataclasses.field(default_factory=list)

  @property
  def num_classes(self):
    return self.count

  @property
  def classes(self):
    odd = ("<b>$x_$", "\u6570\u5b57", "\udcff\n", "")
    return (*odd, *(f"class {i}" for i in range(4, self.count)))

  @property
  def palette(self):
    return make_palette(self.count)

  def __len__(self):
    return len(self.names)

  def __getitem__(self, index):
    self.read.append(index)
    if index in self.broken:
      raise OSError("broken")
    return super().__getitem__(index)

  def name(self, index):
    return self.names[index]


def meter_of(source, indices=None):
  """Predicts the classes of each scene, shifted by some pixels."""
  meter = SegmentationMeter(source)
  for index in range(len(source)) if indices is None else indices:
    label = DigitScenes("validation")[index]["labels"].astype(np.int16)
    label[:8] = IGNORED
    predicted = np.roll(label, 4, axis=1) % source.num_classes
    predicted[-8:, :8] = source.num_classes - 1
    # The batch is larger than the image.
    meter.add(
      {
        "index": np.array([index], np.int32),
        "predicted": np.pad(predicted, ((0, 3), (0, 5)))[None],
        "label": np.pad(label, ((0, 3), (0, 5)), constant_values=-1)[None],
        "size": np.array([label.shape], np.int32),
      }
    )
  return meter


NAMES = ("val/a.jpg", "val/b.x.jpg", "c.png", "val/sub/a.jpg", "c.jpg")
STEMS = ("val/a", "val/b.x", "c~2", "val/sub/a", "c~4")


@pytest.mark.parametrize("num_classes", [11, 256, 257])
def test_label_maps_are_written(tmp_path, num_classes):
  source = Scenes(names=NAMES, count=num_classes)
  meter = meter_of(source, (0, 1, 2, 4))
  meter.write(tmp_path)
  written = {
    str(path.relative_to(tmp_path))
    for path in tmp_path.rglob("*")
    if not path.is_dir()
  }
  stems = {i: STEMS[i] for i in (0, 1, 2, 4)}  # 3 could not be read.
  assert written == {
    "per_class.csv",
    *(f"maps/{stem}.png" for stem in stems.values()),
    *(f"overlays/{stem}.jpg" for stem in stems.values()),
  }
  for index, stem in stems.items():
    with Image.open(tmp_path / "maps" / f"{stem}.png") as image:
      assert image.mode == ("I;16" if num_classes == 257 else "P")
      np.testing.assert_array_equal(image, meter.maps[index].predicted)
      if image.mode == "P":
        colours = np.asarray(image.convert("RGB"))
        expected = source.palette[meter.maps[index].predicted]
        np.testing.assert_array_equal(colours, expected)
    with Image.open(tmp_path / "overlays" / f"{stem}.jpg") as image:
      assert image.size[0] > 1000


def test_table_of_classes(tmp_path):
  source = Scenes(names=NAMES, count=13)
  meter = meter_of(source)
  meter.write(tmp_path)
  path = tmp_path / "per_class.csv"
  text = path.read_text("utf-8", "surrogateescape")
  rows = list(csv.DictReader(io.StringIO(text, newline="")))
  assert [row["class"] for row in rows] == list(source.classes)
  counts = meter.counts
  for label, row in enumerate(rows):
    assert int(row["label"]) == label
    assert int(row["labelled"]) == counts.labelled[label]
    assert int(row["predicted"]) == counts.predicted[label]
    for name in ("iou", "accuracy"):
      share = getattr(counts, name)[label]
      assert row[name] == ("" if np.isnan(share) else repr(float(share)))
  # Class 12 is predicted only; class 11 is absent.
  assert (rows[11]["iou"], rows[11]["accuracy"]) == ("", "")
  assert (float(rows[12]["iou"]), rows[12]["accuracy"]) == (0, "")


@pytest.mark.parametrize(
  ("names", "stems"),
  [
    (["a/x.jpg", "b/x.jpg"], ["a/x", "b/x"]),
    # Cases, compositions and suffixes that share a file.
    (["a/x.jpg", "A/X.JPEG", "a/x"], ["a/x~0", "A/X~1", "a/x~2"]),
    (["\u00e9.png", "e\u0301.png"], ["\u00e9~0", "e\u0301~1"]),
    # A number at the end does not look like an index.
    (["x~1.jpg", "x.jpg", "x.png"], ["x%7E1", "x~1", "x~2"]),
    (["../../etc/x.jpg", "/x.jpg", "./y"], ["%2E./%2E./etc/x", "x", "%2E/y"]),
    ([".hidden.jpg", "a/.b/c"], ["%2Ehidden", "a/%2Eb/c"]),
    (["a\\b:*?.jpg", "50%\n"], ["a%5Cb%3A%2A%3F", "50%25%0A"]),
    (["\udcff.jpg", "\u202e"], ["%ED%B3%BF", "%E2%80%AE"]),
    # A directory with the name of an image's file.
    (["a.jpg", "a.PNG/b.jpg"], ["a", "a.PNG~/b"]),
    (["", ".jpg", "validation[3]"], ["~0", "~1", "validation[3]"]),
    (["a b-c_(1)+x,y=z@\u6570.jpg"], ["a b-c_(1)+x,y=z@\u6570"]),
  ],
)
def test_names_of_files(names, stems):
  assert file_stems(names) == stems


def test_paths_are_relative_to_the_directory_of_all_images():
  names = [f"/home/data/images/{name}" for name in ("a/x.jpg", "y.jpg")]
  assert file_stems(in_common_directory(names)) == ["a/x", "y"]
  assert in_common_directory(names[:1]) == ["x.jpg"]
  assert in_common_directory(["/a/x", "y"]) == ["/a/x", "y"]


NAME_PARTS = st.text("aA.~%/\\\u00e9\u0301\udcff\n01jpg", max_size=9)


@hypothesis.given(st.lists(NAME_PARTS | st.just("\u6570" * 99), max_size=6))
@hypothesis.settings(deadline=None, max_examples=150)
def test_files_of_any_names_are_distinct(names):
  stems = file_stems(names)
  files = [f"{stem}.png".casefold() for stem in stems]
  assert len(set(files)) == len(names)
  folders = {
    str(parent) for file in files for parent in pathlib.PurePath(file).parents
  }
  assert not folders & set(files)
  for file in files:
    parts = file.split("/")
    assert all(part and part[0] != "." for part in parts[:-1])
    assert max(len(part.encode()) for part in parts) < 240


def scene(index=0):
  record = DigitScenes("validation")[index]
  labels = record["labels"].astype(np.int16)
  return Image.fromarray(record["image"]), labels


def shares(picture):
  """Returns the shares of yellow and of black pixels."""
  pixels = np.asarray(picture)
  return [(pixels == colour).all(-1).mean() for colour in (YELLOW, BLACK)]


def draw(maps, photo, classes=("",) * 11, width=200):
  palette = make_palette(len(classes))
  return draw_example(Example("name", photo, maps), classes, palette, width)


def test_wrong_pixels_are_striped():
  photo, labels = scene()
  right = draw(LabelMaps(labels, labels), photo)
  predicted = labels.copy()
  predicted[:, :48] = 10 - labels[:, :48]
  wrong = draw(LabelMaps(predicted, labels), photo)
  assert shares(right)[0] == 0
  yellow, black = shares(wrong)
  # A half of the wrong pixels has each colour; letters are black, too.
  share = (predicted != labels).mean() / 2 * 200 * 200
  share /= wrong.width * wrong.height
  assert yellow == pytest.approx(share, rel=0.1)
  assert black > yellow
  # Nothing is wrong where there is no label.
  ignored = np.full_like(labels, IGNORED)
  assert shares(draw(LabelMaps(predicted, ignored), photo))[0] == 0


def test_names_are_written_into_regions():
  photo, labels = scene()
  ground = np.zeros_like(labels)

  def inside(name):
    """The pixels of the label map's panel."""
    classes = (name, *["x"] * 10)
    picture = draw(LabelMaps(ground, ground), photo, classes, 200)
    return np.asarray(picture)[64:264, 216:416]

  plain, named, long = map(inside, ("", "ground", "w" * 30))
  assert (plain == make_palette(11)[0]).all()
  differs = (plain != named).any(-1)
  assert 0.01 < differs.mean() < 0.2
  assert not differs[:60].any()
  np.testing.assert_array_equal(plain, long)  # It does not fit.
  narrow = ground.copy()
  narrow[:] = np.arange(narrow.shape[1]) // 5 % 2
  classes = ("ground", "sky", *["x"] * 9)
  unnamed = draw(LabelMaps(narrow, narrow), photo, ("",) * 11, 200)
  found = draw(LabelMaps(narrow, narrow), photo, classes, 200)
  np.testing.assert_array_equal(
    np.asarray(unnamed)[64:264, 216:416], np.asarray(found)[64:264, 216:416]
  )


@pytest.mark.parametrize("brightness", [20, 60, 200, 250])
def test_outlines_are_seen_on_any_colour(brightness):
  halves = np.zeros((100, 200), np.int16)
  halves[:, 100:] = 1
  palette = np.full((11, 3), brightness, np.uint8)
  example = Example("name", None, LabelMaps(halves, halves))
  pixels = np.asarray(draw_example(example, ("",) * 11, palette, 200))
  row = pixels[114, 216:416, 0].astype(int)
  (places,) = np.nonzero(row != brightness)
  assert places.tolist() == [99]
  assert abs(row[99] - brightness) > 150


@pytest.mark.parametrize("flip", [False, True])
def test_the_outline_of_a_dark_class_is_white_on_every_side(flip):
  halves = np.zeros((100, 200), np.int16)
  halves[:, 100:] = 1
  palette = np.full((11, 3), 144, np.uint8)
  palette[int(flip)] = 60
  example = Example("name", None, LabelMaps(halves, halves))
  pixels = np.asarray(draw_example(example, ("",) * 11, palette, 200))
  assert pixels[114, 216 + 99].tolist() == [255] * 3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (5, 7)])
@pytest.mark.parametrize("label", [IGNORED, 3])
def test_any_size_is_drawn(size, label):
  labels = np.full(size, label, np.int16)
  maps = LabelMaps(np.zeros(size, np.int16), labels)
  many = tuple(f"a class of a rather long name {i}" for i in range(40))
  for photo in (None, Image.new("RGB", (8, 3))):
    picture = draw(maps, photo, many)
    assert picture.width == 424
    assert picture.height < 1000


def test_a_legend_of_many_classes_is_cut():
  labels = np.arange(150, dtype=np.int16).reshape(10, 15)
  maps = LabelMaps(labels, labels)
  names = tuple(f"class {i}" for i in range(150))
  assert draw(maps, None, names, 400).height < 1100


def test_picture_of_examples():
  names = tuple(f"{i}.jpg" for i in range(9))
  source = Scenes(names=names, broken=(5,))
  # In the order of groups by size.
  meter = meter_of(source, (7, 1, 0, 2, 4, 8, 6, 3))
  source.read.clear()
  png = meter.picture("After step 1,200")
  assert source.read == [0, 2, 4, 7]
  assert len(png) < 2**21
  with Image.open(io.BytesIO(png)) as image:
    assert image.format == "PNG"
    assert image.info["Title"] == "After step 1,200"
    assert image.width < 1000
    assert image.height > 4 * 400
  assert meter.picture("After step 1,200") == png
  # An image may vanish after the evaluation.
  object.__setattr__(source, "broken", (2,))
  assert meter.picture("After step 1,200") != png


@pytest.mark.parametrize("count", [0, 1, 3])
def test_picture_of_few_examples(count):
  source = Scenes(names=("x.jpg",) * count)
  meter = meter_of(source)
  source.read.clear()
  with Image.open(io.BytesIO(meter.picture("Title"))) as image:
    image.load()
  assert source.read == list(range(count))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  source = Scenes(names=("a/x.jpg",))
  meter = meter_of(source)
  (tmp_path / "maps").write_text("")
  with pytest.raises(OSError, match="maps"):
    meter.write(tmp_path)
