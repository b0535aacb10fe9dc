"""Every example runs as its docstring says, on a smaller model."""

import csv
import fcntl
import os
import pathlib
import runpy
import subprocess
import sys
from functools import partial

import pytest
from PIL import Image

import spatial_mamba_jax as smj
from spatial_mamba_jax import create_backbone, create_model
from spatial_mamba_jax.data import decoding

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs an example in this process, and returns what it prints."""

  def run(name, *arguments, stages=2):
    small = {"dims": (4,) * stages, "depths": (1,) * stages}
    for function in (create_model, create_backbone):
      monkeypatch.setattr(smj, function.__name__, partial(function, **small))
    path = EXAMPLES / name
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out

  return run


def test_nnx_training(run):
  *steps, _, last = run("nnx_training.py").splitlines()
  losses = [float(line.split()[-1]) for line in steps]
  assert losses[-1] < losses[0]
  assert last == "largest difference after loading 0.0"


def test_linen(run):
  out = run("linen.py")
  assert "'batch_stats'" in out
  assert "'params'" in out
  assert out.count("logits") == 2


def test_pure_function(run):
  lines = run("pure_function.py").splitlines()
  first, last = (float(line.split()[1]) for line in lines[-2:])
  assert last < first


def test_feature_pyramid(run):
  printed = run("feature_pyramid.py", stages=4)
  assert printed == "(1, 50, 70, 3) -> (1, 13, 18, 5)\n"


def test_classify_folder(run, image_tree, tmp_path):
  folder, out = tmp_path / "images", tmp_path / "out.csv"
  folder.mkdir()
  sources = sorted((image_tree / "train").rglob("*.JPEG"))[:9]
  for i, source in enumerate(sources):
    (folder / f"{i}.JPEG").write_bytes(source.read_bytes())
  (folder / "3.JPEG").write_bytes(b"no image")
  (folder / "notes.txt").write_text("not asked")
  printed = run("classify_folder.py", folder, out, "--image_size=16")
  assert f"{folder / '3.JPEG'}: unreadable: not an image" in printed
  with out.open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [pathlib.Path(row["path"]).name for row in rows] == [
    f"{i}.JPEG" for i in range(9)
  ]
  for i, row in enumerate(rows):
    if i == 3:
      assert row["error"] == "unreadable: not an image of a known format"
      assert row["class"] == row["probability"] == ""
    else:
      assert not row["error"]
      assert 0 <= int(row["class"]) < 10
      assert 0.1 <= float(row["probability"]) <= 1


def test_classify_folder_with_nothing_to_do(run, tmp_path, capsys):
  with pytest.raises(SystemExit):
    run("classify_folder.py", tmp_path / "nowhere", tmp_path / "out.csv")
  assert "nowhere has no images" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("folder", "out", "flags", "expected"),
  [
    ("notes.txt", "out.csv", (), "notes.txt has no images"),
    ("~nobody-of-that-name", "out.csv", (), "there is no home directory"),
    ("gs://bucket", "out.csv", (), "directory of this machine"),
    ("images", "nowhere/out.csv", (), "No such file or directory"),
    ("images", "images", (), "Is a directory"),
    ("images", "out.csv", ("--checkpoint=nowhere",), "nowhere"),
    ("images", "out.csv", ("--image_size=0",), "image_size must be at least 1"),
  ],
)
def test_classify_folder_tells_mistakes_in_one_line(
  run, tmp_path, monkeypatch, capsys, folder, out, flags, expected
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "x.png").write_bytes(b"no image")
  (tmp_path / "notes.txt").touch()
  (tmp_path / "out.csv").write_text("rows of an earlier run")
  with pytest.raises(SystemExit) as caught:
    run("classify_folder.py", folder, out, "--image_size=16", *flags)
  assert caught.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith("classify_folder: ")
  assert error.count("\n") == 1
  assert expected in error
  assert (tmp_path / "out.csv").read_text() == "rows of an earlier run"


def test_classify_folder_keeps_rows_and_names(
  run, tmp_path, monkeypatch, capsys
):
  """Paths may be relative, names may not be UTF-8, and a run may stop."""
  monkeypatch.chdir(tmp_path)
  names = [b"%02d.png" % i for i in range(8)] + [b"caf\xe9.png", b"z.png"]
  (tmp_path / "images" / ".hidden").mkdir(parents=True)
  for name in (*names, b".hidden/x.png"):
    path = os.path.join(os.fsencode(tmp_path), b"images", name)
    with open(path, "wb") as file:
      Image.new("RGB", (20, 20)).save(file, "PNG")
  (tmp_path / "images" / "loop").symlink_to(".")

  def paths() -> list[bytes]:
    lines = (tmp_path / "out.csv").read_bytes().splitlines()[1:]
    return [line.split(b",")[0] for line in lines]

  folder = os.fsencode(tmp_path / "images") + b"/"
  monkeypatch.setenv("HOME", str(tmp_path))
  for _ in range(2):
    run("classify_folder.py", "images", "~/out.csv", "--image_size=16")
    assert paths() == [folder + name for name in names]
  with (tmp_path / "out.csv").open("r+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(SystemExit):
      run("classify_folder.py", "images", "out.csv", "--image_size=16")
  assert (
    f"another run is writing {tmp_path / 'out.csv'}" in capsys.readouterr().err
  )
  assert len(paths()) == 10

  def read(path, read=decoding.read_image):
    if path.name == "z.png":
      raise KeyboardInterrupt
    return read(path)

  monkeypatch.setattr(decoding, "read_image", read)
  with pytest.raises(SystemExit) as caught:
    run("classify_folder.py", "images", "out.csv", "--image_size=16")
  assert caught.value.code == 130
  assert paths() == [folder + name for name in names[:8]]


def test_kernels_only():
  """Runs in a process that has JAX alone."""
  path = EXAMPLES / "kernels_only.py"
  without = "import sys; sys.modules.update(flax=None, optax=None)"
  result = subprocess.run(
    (
      sys.executable,
      "-c",
      f"{without}; import runpy; runpy.run_path({str(path)!r}, None,"
      " '__main__')",
    ),
    env={
      "PYTHONPATH": str(ROOT / "kernels"),
      "JAX_PLATFORMS": "cpu",
      "PATH": "",
    },
    capture_output=True,
    check=True,
    text=True,
  )
  difference = float(result.stdout.splitlines()[1].split()[-1])
  assert difference < 1e-5


def test_all_are_listed():
  table = (EXAMPLES / "README.md").read_text()
  for path in EXAMPLES.glob("*.py"):
    assert f"({path.name})" in table
    assert len(path.read_text().splitlines()) < 100
