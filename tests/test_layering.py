"""Imports run one way, and load no more than is needed."""

import ast
import pathlib
import subprocess
import sys

import pytest
import spatial_mamba_kernels

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "spatial_mamba_jax"
# {layer: layers that it may import}.
ALLOWED = {
  "kernels": {"kernels"},
  "models": {"errors", "fields", "preprocessing", "kernels", "models"},
  "convert": {
    *("errors", "fields", "paths", "preprocessing", "kernels", "models"),
    "convert",
  },
  "data": {"errors", "fields", "paths", "preprocessing", "data"},
  "tasks": {
    *("errors", "fields", "paths", "preprocessing", "kernels", "models"),
    *("data", "tasks", "tasks.base"),
  },
  "training": {
    *("errors", "fields", "paths", "hardware", "kernels", "models", "convert"),
    *("data", "tasks.base", "training"),
  },
  "forecast": {
    *("errors", "paths", "hardware", "models", "data", "training", "forecast"),
  },
  "visualize": {
    *("errors", "paths", "preprocessing", "kernels", "models", "theory"),
    *("create", "data", "training", "visualize"),
  },
}

KERNELS = "spatial_mamba_kernels"
OPERATORS = {path.parent.name for path in (ROOT / "kernels").glob("*/*/api.py")}
# Modules of the kernels that others may import, beside the names in `__all__`.
PUBLIC_MODULES = {"activations", "normalization", "shapes", "typing"}


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


def inside_of_operator(path, module):
  """The other operator whose inside a file would import so, if any."""
  root, operator, *rest = (*module.split("."), "")
  if root != KERNELS or operator not in OPERATORS - {path.parent.name}:
    return None
  exported = ROOT / "kernels" / KERNELS / operator / "__init__.py"
  public = {name.rpartition(".")[2] for name in imports(exported)}
  if rest[0] in public or path.stem == rest[0] == "reference":
    return None
  return operator


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operators_do_not_import_the_insides_of_others(operator):
  files = list((ROOT / "kernels" / KERNELS / operator).glob("*.py"))
  assert len(files) >= 4
  for path in files:
    for module in imports(path):
      assert inside_of_operator(path, module) is None, (path, module)


def test_the_ground_floor_imports_no_operator():
  folder = ROOT / "kernels" / KERNELS
  floor = {*folder.glob("*.py"), *folder.glob("[gt]pu/*.py")}
  for path in floor - {folder / "__init__.py", folder / "cases.py"}:
    for module in imports(path):
      assert inside_of_operator(path, module) is None, (path, module)


def private_uses(path, public):
  """What a file uses of the kernels beyond these names."""
  for module in imports(path):
    root, name, *rest = (*module.split("."), "")
    is_public = name in public | {""}
    is_of_module = name in PUBLIC_MODULES and rest != [""]
    if root == KERNELS and not is_public and not is_of_module:
      yield module
  for node in ast.walk(ast.parse(path.read_text())):
    match node:
      case ast.Attribute(ast.Name("smk"), name) if name not in public:
        yield f"smk.{name}"


def test_others_use_public_names_of_the_kernels():
  public = set(spatial_mamba_kernels.__all__)
  files = list((ROOT / PACKAGE).rglob("*.py"))
  assert files
  private = {path: list(private_uses(path, public)) for path in files}
  assert not {path: names for path, names in private.items() if names}


@pytest.mark.parametrize(
  "line",
  [
    "from spatial_mamba_kernels import gpu",
    "from spatial_mamba_kernels.dispatch import keep",
    "import spatial_mamba_kernels.gpu.device",
    "smk.gpu",
  ],
)
def test_a_private_use_is_found(tmp_path, line):
  path = tmp_path / "module.py"
  path.write_text(line)
  assert list(private_uses(path, set(spatial_mamba_kernels.__all__)))


@pytest.mark.parametrize("name", ["xla.states", "api.operator", "mosaic_gpu"])
def test_an_inside_is_found(name):
  path = ROOT / "kernels" / KERNELS / "structure_aware_ssm" / "xla.py"
  module = f"{KERNELS}.selective_scan.{name}"
  assert inside_of_operator(path, module) == "selective_scan"


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_scripts_know_no_task(script):
  names = set(map(layer_of, imports(ROOT / script))) - {None}
  assert names == {"errors", "training"}


def test_there_is_no_utils():
  assert not list(ROOT.glob("[!.]*/**/utils.py"))


def imported_modules(statement):
  """Modules in a fresh interpreter after `statement`."""
  path = f"{ROOT}:{ROOT / 'kernels'}"
  result = subprocess.run(
    (sys.executable, "-c", f"{statement}; import sys; print(*sys.modules)"),
    env={"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PATH": ""},
    capture_output=True,
    check=True,
    text=True,
  )
  return set(result.stdout.split())


def imported_packages(statement):
  """Top-level packages in a fresh interpreter after `statement`."""
  return {module.partition(".")[0] for module in imported_modules(statement)}


def kernel_languages(statement):
  """What of Pallas and Mosaic `statement` loads, but JAX does not by itself."""
  modules = imported_modules(statement)
  modules -= imported_modules("import jax, jax.export, jax.extend.core")
  return {x for x in modules if "pallas" in x or "mosaic" in x}


def test_kernels_need_jax_alone():
  # Pallas imports absl if it is installed.
  packages = imported_packages(
    "import sys; sys.modules['absl'] = None; import spatial_mamba_kernels"
  )
  assert not packages & {"flax", "optax", "grain", "orbax", "PIL"}


@pytest.mark.parametrize("name", ["spatial_mamba_kernels", "spatial_mamba_jax"])
def test_importing_loads_no_pallas(name):
  assert not kernel_languages(f"import {name}")


def test_running_on_a_cpu_loads_no_pallas():
  """Also under jit, differentiated, and in a shard_map."""
  statement = """
import jax
import jax.numpy as jnp
import spatial_mamba_kernels as smk
x, kernel, numbers = (jnp.ones(n) for n in ((2, 3, 3, 8), (3, 3, 8), 8))
def loss(x):
  x, y = smk.residual_layer_norm(x, numbers, numbers)
  y = smk.residual_depthwise_conv(y, kernel, numbers)
  y, p = smk.silu_depthwise_conv(y, kernel, numbers, jnp.ones((8, 1)))
  stencil = jnp.ones((3, *kernel.shape)), jnp.ones(3)
  y = smk.structure_aware_ssm(y, y, -jnp.ones((8, 1)), p, p, numbers, *stencil)
  y = smk.mlp(y, jnp.eye(8), numbers, jnp.eye(8), numbers, residual=x)
  return smk.gated_layer_norm(y, numbers, numbers, x).sum()
mesh, spec = jax.make_mesh((1,), ("data",)), jax.sharding.PartitionSpec()
split = jax.shard_map(loss, mesh=mesh, in_specs=spec, out_specs=spec)
for function in (loss, split):
  jax.block_until_ready(jax.jit(jax.grad(function))(x))
"""
  assert not kernel_languages(f"exec({statement!r})")
  # That the kernels do load it.
  statement += """
stencil = jnp.ones((3, *kernel.shape)), jnp.ones(3)
named = lambda x: smk.state_fusion(x, *stencil, implementation="mosaic_gpu")
jax.eval_shape(named, x)
"""
  assert "jax.experimental.pallas" in kernel_languages(f"exec({statement!r})")


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
    "onnx",
  }


@pytest.mark.parametrize("name", ["spatial_mamba_jax", "spatial_mamba_kernels"])
def test_without_jaxtyping(name):
  imported_packages(
    f"import sys; sys.modules['jaxtyping'] = None; import {name}"
  )
