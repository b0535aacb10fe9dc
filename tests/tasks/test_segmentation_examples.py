"""Examples of images with label maps, against mmsegmentation's pipeline."""

import io
import itertools
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from spatial_mamba_jax.data import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  DataConfig,
  DataError,
  evaluation_batches,
  open_source,
  train_batches,
)
from spatial_mamba_jax.data.examples import GroupedExamples, WrongRecordError
from spatial_mamba_jax.data.resizing import resize_image, resize_labels
from spatial_mamba_jax.tasks.segmentation.config import SegmentationConfig
from spatial_mamba_jax.tasks.segmentation.examples import (
  SegmentationExamples,
  Shapes,
  draw_crop,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "segmentation"
AUGMENT = dict(np.load(GOLDEN / "augment.npz"))
PREPROCESSOR = dict(np.load(GOLDEN / "preprocessor.npz"))
NUM_CLASSES = 5
# Resizes no image of 64 x 64 pixels, and takes any crop.
UNCHANGED = SegmentationConfig(
  num_classes=NUM_CLASSES,
  box=(64, 64),
  box_ratio=(1.0, 1.0),
  max_class_share=1.0,
  distortion_probability=0.0,
)


def record_of(image, labels, ignored=255):
  return {"image": image, "labels": labels, "offset": 0, "ignored": ignored}


def noise(height, width, seed=0):
  rng = np.random.default_rng(seed)
  return record_of(
    rng.integers(0, 256, (height, width, 3), np.uint8),
    rng.integers(0, NUM_CLASSES, (height, width), np.uint8),
  )


class Images:
  """A source of noise in these sizes; a size of None is unreadable."""

  num_classes = NUM_CLASSES
  classes = ("a", "b", "c", "d", "e")
  palette = np.zeros((NUM_CLASSES, 3), np.uint8)

  def __init__(self, *sizes):
    self.sizes = sizes

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, index):
    return noise(*self.image_size(index), seed=index)

  def image_size(self, index):
    if self.sizes[index] is None:
      raise ValueError("torn")
    return self.sizes[index]

  def name(self, index):
    return f"image {index}"


class Scripted(np.random.Generator):
  """Returns these integers, in their order."""

  def __init__(self, values):
    super().__init__(np.random.PCG64(0))
    self.values = list(values)

  def integers(self, high):
    value = self.values.pop(0)
    assert 0 <= value < high
    return value


class TestCrop:
  @pytest.mark.parametrize("case", range(len(AUGMENT["crop_box"])))
  def test_equals_the_original(self, case):
    labels = AUGMENT["crop_label"].astype(np.int16)
    labels[labels == 255] = -1
    offsets = AUGMENT["crop_offsets"][case].ravel().tolist()
    rng = Scripted(offsets)
    window = draw_crop(labels, labels.shape, 16, 0.75, rng)
    top, bottom, left, right = AUGMENT["crop_box"][case]
    assert window == (top, left, bottom - top, right - left)
    drawn = (len(offsets) - len(rng.values)) // 2
    assert drawn == AUGMENT["crop_draws"][case]

  def test_the_last_draw_is_not_checked(self):
    labels = np.zeros((20, 20), np.int16)
    rng = Scripted([*[1, 2] * 10, 3, 4])
    assert draw_crop(labels, (20, 20), 8, 0.75, rng) == (3, 4, 8, 8)
    assert not rng.values

  def test_ignored_pixels_are_no_class(self):
    labels = np.zeros((8, 8), np.int16)
    labels[:6] = -1
    labels[6] = 1
    rng = Scripted([0, 0])  # Each class has half of the labelled pixels.
    assert draw_crop(labels, (8, 8), 8, 0.75, rng) == (0, 0, 8, 8)
    labels[6] = -1
    assert draw_crop(labels, (8, 8), 8, 0.75, Scripted([0] * 22))

  def test_a_share_of_one_accepts_all(self):
    labels = np.zeros((8, 8), np.int16)
    assert draw_crop(labels, (8, 9), 8, 1.0, Scripted([0, 1])) == (0, 1, 8, 8)

  def test_a_small_image_keeps_its_size(self):
    labels = np.zeros((8, 30), np.int16)
    rng = Scripted([0, 14])
    assert draw_crop(labels, (8, 30), 16, 1.0, rng) == (0, 14, 8, 16)


class TestTraining:
  @pytest.mark.parametrize("number", [0, 1])
  def test_padding_equals_the_original(self, number):
    """After normalising, what is beyond the size is 0, the mean colour."""
    image = PREPROCESSOR[f"pre_bgr{number}"][::-1].transpose(1, 2, 0)
    labels = PREPROCESSOR[f"pre_label{number}"][0]
    config = SegmentationConfig(
      num_classes=255,
      box=(max(labels.shape), min(labels.shape)),
      box_ratio=(1.0, 1.0),
      max_class_share=1.0,
      distortion_probability=0.0,
    )
    data = DataConfig(image_size=64, flip_probability=0.0)
    examples = SegmentationExamples(config, data)
    decoded = examples.read(record_of(np.ascontiguousarray(image), labels))
    example = examples.train(decoded, np.random.default_rng(0))
    height, width = example["size"]
    normal = (example["image"] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    normal[height:], normal[:, width:] = 0, 0
    expected = PREPROCESSOR["pre_out"][number].transpose(1, 2, 0)
    np.testing.assert_allclose(normal, expected, atol=2e-6)
    expected = PREPROCESSOR["pre_labels"][number, 0].astype(int)
    expected[expected == 255] = -1
    np.testing.assert_array_equal(example["label"], expected)

  def examples(self, size=48, flip_probability=0.5, **settings):
    config = SegmentationConfig(
      num_classes=NUM_CLASSES, box=(96, 48), **settings
    )
    data = DataConfig(image_size=size, flip_probability=flip_probability)
    return SegmentationExamples(config, data)

  def test_contents(self):
    examples = self.examples()
    blank = examples.blank(train=True)
    decoded = examples.read(noise(30, 70))
    rng = np.random.default_rng(0)
    heights = set()
    for _ in range(20):
      example = examples.train(decoded, rng)
      assert example.keys() == blank.keys() == {"image", "label", "size"}
      for name, array in example.items():
        assert array.shape == blank[name].shape
        assert array.dtype == blank[name].dtype
      height, width = example["size"]
      heights.add(int(height))
      assert (example["label"][:height, :width] >= 0).all()
      assert (example["label"][height:] == -1).all()
      assert (example["label"][:, width:] == -1).all()
      assert not example["image"][height:].any()
      assert not example["image"][:, width:].any()
    assert min(heights) < 30  # Ratio 0.5 makes it 21 pixels high.
    assert max(heights) == 48
    assert (blank["label"] == -1).all()
    assert blank["size"].tolist() == [48, 48]

  def test_what_is_drawn_in_which_order(self):
    """The ratio, offsets of crops, the flip, then the distortion."""
    labels = np.arange(100 * 80, dtype=np.uint8).reshape(100, 80) % NUM_CLASSES
    image = np.zeros((100, 80, 3), np.uint8)
    image[..., 0], image[..., 1] = np.mgrid[:100, :80]
    config = SegmentationConfig(
      num_classes=NUM_CLASSES, box=(100, 80), distortion_probability=0.0
    )
    examples = SegmentationExamples(config, DataConfig(image_size=32))
    decoded = examples.read(record_of(image, labels))
    flips = 0
    for seed in range(12):
      example = examples.train(decoded, np.random.default_rng(seed))
      rng = np.random.default_rng(seed)
      ratio = rng.uniform(0.5, 2)
      # Both sides of the box are truncated before the image is fitted into it.
      factor = min(int(100 * ratio) / 100, int(80 * ratio) / 80)
      size = int(100 * factor + 0.5), int(80 * factor + 0.5)
      top, left = (int(rng.integers(side - 32 + 1)) for side in size)
      step = -1 if rng.random() < 0.5 else 1
      flips += step < 0
      here = slice(top, top + 32), slice(left, left + 32)
      np.testing.assert_array_equal(
        example["image"], resize_image(image, size)[here][:, ::step]
      )
      np.testing.assert_array_equal(
        example["label"], resize_labels(labels, size)[here][:, ::step]
      )
    assert 0 < flips < 12

  def test_distortion_changes_colours_only(self):
    decoded = self.examples().read(noise(48, 96))
    plain, distorted = (
      self.examples(distortion_probability=x).train(
        decoded, np.random.default_rng(3)
      )
      for x in (0.0, 1.0)
    )
    np.testing.assert_array_equal(plain["label"], distorted["label"])
    assert (plain["image"] != distorted["image"]).mean() > 0.5

  def test_resumes(self):
    config = DataConfig(name="digit_scenes", image_size=64)
    source = open_source(config, "train")
    task = SegmentationConfig(num_classes=11, box=(96, 96))
    examples = SegmentationExamples(task, config)
    taken = []
    for config.num_threads, start in ((2, 0), (2, 2), (1, 2)):
      with train_batches(
        source,
        config,
        batch_size=3,
        seed=5,
        start_step=start,
        examples=examples,
      ) as batches:
        taken.append(list(itertools.islice(batches, 4 - start)))
    for resumed in taken[1:]:
      for one, other in zip(resumed, taken[0][2:], strict=True):
        assert one.keys() == {"image", "label", "size"}
        for name, array in one.items():
          np.testing.assert_array_equal(array, other[name])
    assert (taken[0][0]["image"] != taken[0][1]["image"]).any()


class TestReading:
  EXAMPLES = SegmentationExamples(UNCHANGED, DataConfig())

  def test_the_orientation_is_applied(self):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6  # The left edge is to be at the top.
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    labels = np.zeros((24, 16), np.uint8)
    labels[:8] = 1
    decoded = self.EXAMPLES.read(record_of(file.getvalue(), labels))
    assert decoded.image.shape == (24, 16, 3)
    np.testing.assert_array_equal(
      decoded.labels == 1, decoded.image[..., 0] > 0
    )
    with pytest.raises(WrongRecordError, match="24 x 16 pixels and the image"):
      self.EXAMPLES.read(record_of(file.getvalue(), labels.T))

  def test_labels_have_the_number_of_classes_of_the_task(self):
    labels = np.full((4, 4), NUM_CLASSES, np.uint8)
    record = record_of(np.zeros((4, 4, 3), np.uint8), labels)
    with pytest.raises(WrongRecordError, match="has the value 5 in 16 pixels"):
      self.EXAMPLES.read(record)

  @pytest.mark.parametrize("split", ["train", "validation"])
  def test_a_wrong_label_map_ends_the_run(self, tmp_path, split):
    for kind in ("train", "val"):
      for folder, suffix, pixels in (
        ("images", "jpg", np.zeros((8, 8, 3), np.uint8)),
        ("labels", "png", np.full((8, 8), 3, np.uint8)),
      ):
        path = tmp_path / folder / kind / f"x.{suffix}"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    config = DataConfig(
      name="segmentation_folder", data_dir=str(tmp_path), image_size=8
    )
    source = open_source(config, split)
    task = SegmentationConfig(num_classes=2, box=(8, 8))
    examples = SegmentationExamples(task, config)
    batches = (
      train_batches(source, config, batch_size=1, seed=0, examples=examples)
      if split == "train"
      else evaluation_batches(source, config, batch_size=1, examples=examples)
    )
    with batches, pytest.raises(DataError) as caught:
      next(batches)
    assert str(caught.value) == (
      f"{source.name(0)}: its label map has the value 3 in 64 pixels: 2 classes"
      " have the values 0 to 1, and pixels without a class have 255"
    )


class TestEvaluation:
  CONFIG = SegmentationConfig(
    num_classes=NUM_CLASSES, box=(64, 32), test_ratios=(0.75, 1.0)
  )
  # The first, the fourth and the fifth have views of one size.
  SIZES = ((40, 60), (40, 20), None, (36, 54), (40, 60), (24, 48), (41, 60))

  def examples(self) -> SegmentationExamples:
    return SegmentationExamples(self.CONFIG, DataConfig(image_size=16))

  def test_views(self):
    examples = self.examples()
    record = noise(40, 60)
    example = examples.evaluate(examples.read(record))
    assert example.keys() == {"image_0", "image_1", "label", "size"}
    np.testing.assert_array_equal(
      example["image_0"], resize_image(record["image"], (24, 36))
    )
    np.testing.assert_array_equal(
      example["image_1"], resize_image(record["image"], (32, 48))
    )
    np.testing.assert_array_equal(example["label"], record["labels"])
    assert example["label"].dtype == np.int16
    assert example["size"].tolist() == [40, 60]
    assert example["size"].dtype == np.int32

  def test_groups(self):
    groups = self.examples().groups(Images(*self.SIZES))
    found = [(x.examples.shapes, x.indices.tolist()) for x in groups]
    assert found == [
      # The largest views first; the unreadable record is among them.
      (Shapes(((24, 48), (32, 64)), (24, 48)), [2, 5]),
      (Shapes(((48, 24), (64, 32)), (40, 20)), [1]),
      (Shapes(((24, 36), (32, 48)), (40, 60)), [0, 3, 4]),
      (Shapes(((24, 35), (32, 47)), (41, 60)), [6]),
    ]

  def test_small_label_maps_are_not_padded_to_large_ones(self):
    groups = self.examples().groups(Images((40, 60), (20, 30), (36, 54)))
    labels = [(x.examples.shapes.label, x.indices.tolist()) for x in groups]
    assert labels == [((20, 30), [1]), ((40, 60), [0, 2])]

  def test_no_readable_header(self):
    (group,) = self.examples().groups(Images(None, None))
    assert group.indices.tolist() == [0, 1]
    assert group.examples.blank(train=False)["label"].shape == (16, 16)

  def test_batches(self):
    source = Images(*self.SIZES)
    config = DataConfig(max_unreadable_share=0.5)
    seen = []
    examples = self.examples()
    with evaluation_batches(
      source, config, batch_size=2, examples=examples
    ) as batches:
      for batch in batches:
        for i in np.flatnonzero(batch["mask"]):
          index = int(batch["index"][i])
          seen.append(index)
          height, width = source.sizes[index]
          assert batch["size"][i].tolist() == [height, width]
          alone = examples.evaluate(examples.read(source[index]))
          for name in ("image_0", "image_1"):
            np.testing.assert_array_equal(batch[name][i], alone[name])
          label = batch["label"][i]
          np.testing.assert_array_equal(label[:height, :width], alone["label"])
          assert (label[height:] == -1).all()
          assert (label[:, width:] == -1).all()
      assert batches.unreadable == ("image 2",)
    assert sorted(seen) == [0, 1, 3, 4, 5, 6]

  def test_an_image_of_another_size_than_its_group_is_unreadable(self):
    (group,) = self.examples().groups(Images((40, 60)))
    for size in ((40, 20), (80, 120)):
      with pytest.raises(ValueError, match="another size than its header"):
        group.examples.evaluate(group.examples.read(noise(*size)))
    assert group.examples.evaluate(group.examples.read(noise(20, 30)))

  def test_a_blank_example_has_the_shapes_of_its_group(self):
    for group in self.examples().groups(Images((40, 60), (20, 40))):
      size = (40, 60) if group.indices[0] == 0 else (20, 40)
      examples = group.examples
      example = examples.evaluate(examples.read(noise(*size)))
      blank = examples.blank(train=False)
      assert blank.keys() == example.keys()
      for name, array in example.items():
        assert blank[name].shape == array.shape
        assert blank[name].dtype == array.dtype
      assert (blank["label"] == -1).all()

  def test_is_picklable_and_an_interface(self):
    examples = self.examples()
    assert isinstance(examples, GroupedExamples)
    (group,) = examples.groups(Images((40, 60)))
    for each in (examples, group.examples):
      assert pickle.loads(pickle.dumps(each)) == each
