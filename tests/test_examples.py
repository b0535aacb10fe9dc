"""Every example runs as its docstring says, on a smaller model."""

import csv
import pathlib
import runpy
import subprocess
import sys

import pytest

from spatial_mamba_jax.models import config as models

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs an example in this process, and returns what it prints."""

  def run(name, *arguments, stages=2):
    small = models.ModelConfig(
      dims=(4,) * stages, depths=(1,) * stages, num_classes=10
    )
    monkeypatch.setitem(models._PRESETS, "spatial_mamba_micro", small)
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


def test_kernels_only():
  """In a process that has no package but JAX."""
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
