"""Trees of image files."""

import os
import pathlib
import shutil

import pytest

from spatial_mamba_jax.data import DataConfig, DataError, open_source
from spatial_mamba_jax.errors import UserError


def open_tree(root, split="train"):
  config = DataConfig(name="image_folder", data_dir=str(root))
  return open_source(config, split)


@pytest.fixture
def tree(image_tree, tmp_path):
  return shutil.copytree(image_tree, tmp_path / "tree")


def test_labels_count_sorted_classes(image_tree):
  for split, directory in (("train", "train"), ("validation", "val")):
    source = open_tree(image_tree, split)
    # Sorting whole paths orders by class, then by name: the tree is flat.
    files = sorted((image_tree / directory).glob("*/*"))
    assert source.num_classes == 3
    assert len(source) == len(files) > 0
    for i, path in enumerate(files):
      assert source.name(i) == str(path)
      assert source[i]["image"] == path.read_bytes()
      label = ["n01440764", "n02102040", "n03000684"].index(path.parent.name)
      assert source[i]["label"] == label


def test_validation_may_be_spelt_out(tree):
  (tree / "val").rename(tree / "validation")
  assert len(open_tree(tree, "validation")) == 9


def test_takes_nested_images_and_leaves_other_files(tree):
  directory = tree / "train" / "n01440764"
  image = next(directory.glob("*.JPEG"))
  (directory / "more").mkdir()
  shutil.copy(image, directory / "more" / "ä.jpg")
  shutil.copy(image, directory / ".hidden.jpg")
  (directory / "list.txt").write_text("not an image")
  (tree / "train" / ".cache").mkdir()
  source = open_tree(tree)
  names = [source.name(i) for i in range(len(source))]
  assert source.num_classes == 3
  assert len(names) == 13
  assert str(directory / "more" / "ä.jpg") in names


class TestWhatIsRead:
  """`train/n01440764` of the tree, with more in it."""

  @pytest.fixture
  def directory(self, tree) -> pathlib.Path:
    return tree / "train" / "n01440764"

  @pytest.fixture
  def image(self, directory) -> pathlib.Path:
    return min(directory.glob("*.JPEG"))

  def names(self, tree) -> list[str]:
    source = open_tree(tree)
    prefix = f"{tree}/train/"
    return [source.name(i).removeprefix(prefix) for i in range(len(source))]

  def test_leaves_out_what_systems_keep_for_themselves(
    self, tree, directory, image, caplog
  ):
    expected = self.names(tree)
    for name in (
      *(".ipynb_checkpoints", ".AppleDouble", ".Trash-1000/files", "__MACOSX"),
      *("@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "more/@eaDir/x"),
      "System Volume Information",
    ):
      for parent in (directory, tree / "train"):
        (parent / name).mkdir(parents=True)
        shutil.copy(image, parent / name)
    (tree / "train" / "more").rename(tree / "train" / ".more")
    shutil.copy(image, directory / "._resource.jpg")
    assert self.names(tree) == expected
    assert not caplog.messages

  def test_reads_the_suffixes_of_pillow(self, directory, image, tree):
    names = "a.jfif", "b.JPE", "c.avif", "d.gif", "e.jp2", "f.pbm", "g.TIF"
    for name in names:
      shutil.copy(image, directory / name)
    found = {pathlib.Path(name).name for name in self.names(tree)}
    assert found >= set(names)

  def test_says_what_it_passes_over(self, directory, image, tree, caplog):
    for name in ("a.heic", "b.HEIC", "c.tga", "bare"):
      shutil.copy(image, directory / name)
    assert len(self.names(tree)) == 12
    (line,) = caplog.messages
    assert line == (
      f"{tree}/train: files skipped for their suffix: 2 .heic, "
      "1 without a suffix, 1 .tga"
    )

  def test_says_which_classes_are_empty(self, tree, caplog):
    for split in ("train", "val"):
      (tree / split / "empty").mkdir()
    assert len(self.names(tree)) == 12
    (line,) = caplog.messages
    assert line == f"{tree}/train: no images of 1 of 4 classes: empty"

  def test_names_may_be_in_any_encoding(self, directory, image, tree):
    for name in (
      b"caf\xe9.jpg",
      "caf\N{LATIN SMALL LETTER E WITH ACUTE}.jpg".encode(),
    ):
      shutil.copy(image, os.fsencode(directory) + b"/" + name)
    source = open_tree(tree)
    names = [os.fsencode(source.name(i)) for i in range(len(source))]
    assert os.fsencode(directory) + b"/caf\xe9.jpg" in names
    for i in range(len(source)):
      assert source[i]["image"]

  def test_pipes_and_devices_are_no_images(self, directory, tree):
    expected = self.names(tree)
    os.mkfifo(directory / "pipe.jpg")
    (directory / "endless.jpg").symlink_to("/dev/zero")
    assert self.names(tree) == expected

  def test_a_link_to_nothing_is_an_image_that_is_not_there(
    self, directory, tree
  ):
    (directory / "x.jpg").symlink_to("nowhere")
    (directory / "y.jpg").symlink_to("y.jpg")
    source = open_tree(tree)
    assert len(source) == 14
    for i in range(len(source)):
      if source.name(i).endswith("jpg"):
        with pytest.raises(OSError, match=r"No such file|symbolic links"):
          source[i]


class TestLinks:
  """As torchvision follows them, but no directory twice within a class."""

  @pytest.fixture
  def root(self, tmp_path) -> pathlib.Path:
    for name in ("a/x", "b", "elsewhere/deep"):
      (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "elsewhere").rename(tmp_path / "elsewhere")
    for path in ("train/a/1.png", "train/a/x/2.png", "train/b/3.png"):
      (tmp_path / path).touch()
    (tmp_path / "elsewhere" / "4.png").touch()
    (tmp_path / "elsewhere" / "deep" / "5.png").touch()
    return tmp_path

  @pytest.mark.parametrize(
    ("link", "target", "more"),
    [
      ("a/loop", ".", ()),
      ("a/loop", "../a", ()),
      ("a/x/loop", "..", ()),
      ("a/A", "x", ()),  # The directory itself is found, not the link.
      ("a/up", "..", ()),  # That is all classes.
      ("a/up", "../../..", ()),
      ("a/out", "../../elsewhere", ("a/out/4.png", "a/out/deep/5.png")),
      ("a/other", "../b", ("a/other/3.png",)),
      ("c", "../elsewhere", ("c/4.png", "c/deep/5.png")),
    ],
  )
  def test_one(self, root, link, target, more):
    (root / "train" / link).symlink_to(target, target_is_directory=True)
    source = open_tree(root)
    names = [
      source.name(i).removeprefix(f"{root}/train/") for i in range(len(source))
    ]
    assert names == sorted(["a/1.png", "a/x/2.png", "b/3.png", *more])

  def test_several_to_the_same(self, root):
    for name in ("a/q", "a/p"):
      (root / "train" / name).symlink_to("../../elsewhere")
    (root / "elsewhere" / "back").symlink_to(root / "train" / "a")
    source = open_tree(root)
    names = [source.name(i) for i in range(len(source))]
    assert len(names) == 5
    assert f"{root}/train/a/p/4.png" in names

  def test_a_class_may_be_a_link_and_lead_back(self, root):
    (root / "train" / "c").symlink_to("../elsewhere")
    (root / "elsewhere" / "up").symlink_to(root / "train")
    assert len(open_tree(root)) == 5


class TestErrors:
  def test_no_directory_given(self):
    with pytest.raises(
      DataError, match=r"data\.data_dir must name the image_folder's root"
    ):
      open_tree("")

  @pytest.mark.parametrize(
    ("split", "directory", "expected"),
    [
      ("train", "train", "no directory train/ in"),
      ("validation", "val", "no directory val/ or validation/ in"),
    ],
  )
  def test_missing_split(self, tree, split, directory, expected):
    shutil.rmtree(tree / directory)
    with pytest.raises(DataError, match=expected):
      open_tree(tree, split)

  def test_no_images(self, tree):
    for path in (tree / "val").glob("*/*"):
      path.unlink()
    with pytest.raises(DataError, match=r"val has no images: .*val/<class>/"):
      open_tree(tree, "validation")

  @pytest.mark.parametrize("split", ["train", "validation"])
  def test_classes_that_differ(self, tree, split):
    shutil.rmtree(tree / "val" / "n02102040")
    with pytest.raises(DataError, match=r"same class directories.* n02102040$"):
      open_tree(tree, split)

  def test_a_directory_that_cannot_be_read(self, tree, monkeypatch):
    # Where tests run as root, every directory can be.
    broken, scandir = str(tree / "train" / "n02102040"), os.scandir

    def refuse(path):
      if str(path) == broken:
        raise PermissionError(13, "Permission denied", broken)
      return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{broken}: Permission denied"):
      open_tree(tree)

  @pytest.mark.parametrize(
    ("data_dir", "expected"),
    [
      ("gs://bucket/tree", "must be a directory of this machine"),
      ("file:///tree", "must be a directory of this machine"),
      ("/tree\0", "must be a string"),
      ("/" + "x" * 300, "File name too long"),
      ("~nobody-of-that-name/tree", "there is no home directory for ~nobody"),
    ],
  )
  def test_no_path_of_this_machine(self, data_dir, expected):
    with pytest.raises(UserError, match=expected) as caught:
      open_tree(data_dir)
    assert "\n" not in str(caught.value)

  def test_a_file_too_large(self, tree):
    source = open_tree(tree)
    os.truncate(source.name(0), 2**40)
    with pytest.raises(ValueError, match="bytes of memory, more than"):
      source[0]
