"""Imports run one way, and the models need no more than jax, flax and optax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "spatial_mamba_jax"
# {layer: layers that it may import}.
ALLOWED = {
  "kernels": {"kernels"},
  "models": {"errors", "fields", "kernels", "models"},
  "convert": {"errors", "fields", "paths", "kernels", "models", "convert"},
  "data": {"errors", "fields", "paths", "data"},
  "tasks": {
    *("errors", "fields", "paths", "kernels", "models", "data"),
    *("tasks", "tasks.base"),
  },
  "training": {
    *("errors", "fields", "paths", "kernels", "models", "convert"),
    *("data", "tasks.base", "training"),
  },
}


def layer_of(module):
  """Returns the layer of a dotted module name; None outside the project."""
  parts = module.split(".")
  if parts[0] == "spatial_mamba_kernels":
    return "kernels"
  if parts[0] == PACKAGE and len(parts) > 1:
    return "tasks.base" if parts[1:3] == ["tasks", "base"] else parts[1]
  return None


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path} has a relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_run_one_way(layer):
  folder = ROOT / ("kernels" if layer == "kernels" else f"{PACKAGE}/{layer}")
  # A __main__ is a script, above all layers.
  files = [x for x in folder.rglob("*.py") if x.name != "__main__.py"]
  assert files
  for path in files:
    for module in imports(path):
      imported = layer_of(module)
      assert imported is None or imported in ALLOWED[layer], (path, module)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_scripts_know_no_task(script):
  names = set(map(layer_of, imports(ROOT / script))) - {None}
  assert names == {"errors", "training"}


def test_there_is_no_utils():
  assert not list(ROOT.glob("[!.]*/**/utils.py"))


def imported_packages(statement):
  """Returns the top-level packages of a new process after `statement`."""
  code = (
    f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
  )
  path = f"{ROOT}:{ROOT / 'kernels'}"
  result = subprocess.run(
    (sys.executable, "-c", code),
    env={"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    check=True,
    text=True,
  )
  return set(result.stdout.split())


def test_kernels_need_jax_alone():
  # Pallas imports absl if it is installed.
  packages = imported_packages(
    "import sys; sys.modules['absl'] = None; import spatial_mamba_kernels"
  )
  assert not packages & {"flax", "optax", "grain", "orbax", "PIL"}


def test_models_need_no_data_package():
  packages = imported_packages(
    "import benchmarks.model, spatial_mamba_jax.training.step"
  )
  assert not packages & {
    "grain",
    "tensorflow_datasets",
    "tensorflow",
    "PIL",
    "ml_collections",
    "tensorboardX",
    "array_record",
    "orbax",
    "safetensors",
  }


@pytest.mark.parametrize("name", ["spatial_mamba_jax", "spatial_mamba_kernels"])
def test_without_jaxtyping(name):
  imported_packages(
    f"import sys; sys.modules['jaxtyping'] = None; import {name}"
  )
