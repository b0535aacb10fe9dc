import shutil

import pytest

from spatial_mamba_jax.data import DataConfig, DataError, open_source


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


class TestErrors:
  def test_no_directory_given(self):
    with pytest.raises(DataError, match=r"data\.data_dir must name the root"):
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
