"""Checkpoint files as PyTorch writes them, written without it."""

import io
import pathlib
import pickle
import sys
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spatial_mamba_jax as smj
from spatial_mamba_jax.convert.architecture import abstract_model
from spatial_mamba_jax.convert.names import variables
from spatial_mamba_jax.models.presets import get_model_config

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
_STORAGES = {
  "float64": "DoubleStorage",
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "int64": "LongStorage",
}


def _named(module, name):
  """A class that pickles as a name in a module."""
  return type(name, (), {"__module__": module, "__qualname__": name})


class _Pickler(pickle.Pickler):
  """Pickles arrays as tensors, and keeps their bytes for storage records."""

  def __init__(self, file, modules):
    super().__init__(file, protocol=2)
    self.modules, self.records = modules, []

  def reducer_override(self, value):
    if not isinstance(value, np.ndarray):
      return NotImplemented
    strides = tuple(step // value.itemsize for step in value.strides)
    rebuild = self.modules["torch._utils"]._rebuild_tensor_v2
    arguments = (_Storage(value), 0, value.shape, strides, False, {})
    return rebuild, arguments

  def persistent_id(self, value):
    if not isinstance(value, _Storage):
      return None
    array = value.array
    self.records.append(array.tobytes())
    kind = getattr(self.modules["torch"], _STORAGES[array.dtype.name])
    record = str(len(self.records) - 1)
    return ("storage", kind, record, "cpu", array.size)


class _Storage:
  def __init__(self, array):
    self.array = array


def _write_archive(path, data, records=(), root="archive/"):
  """Writes a zip file with a pickle and the bytes of storages."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr(f"{root}data.pkl", data)
    archive.writestr(f"{root}byteorder", "little")
    for i, record in enumerate(records):
      archive.writestr(f"{root}data/{i}", record)


@pytest.fixture(scope="session")
def write_archive():
  return _write_archive


@pytest.fixture
def write_checkpoint(monkeypatch):
  """Writes {key: contiguous arrays, or anything} as torch.save does."""
  modules = {
    name: types.ModuleType(name)
    for name in ("torch", "torch._utils", "mmengine")
  }
  modules["torch._utils"]._rebuild_tensor_v2 = _named(
    "torch._utils", "_rebuild_tensor_v2"
  )
  modules["mmengine"].HistoryBuffer = _named("mmengine", "HistoryBuffer")
  for name in _STORAGES.values():
    setattr(modules["torch"], name, _named("torch", name))

  def write(path, make):
    file = io.BytesIO()
    pickler = _Pickler(file, modules)
    with monkeypatch.context() as patch:
      for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
      pickler.dump(make(modules) if callable(make) else make)
    _write_archive(path, file.getvalue(), pickler.records)
    return path

  return write


@pytest.fixture(scope="session")
def micro_checkpoint(named_weights, tmp_path_factory):
  """Returns micro's checkpoint of the authors' trainer, without its optimizer.

  The pickle is theirs. The weights follow from names: seed 0 for `model`, seed
  1 for `model_ema`.
  """
  records = [
    tensor.tobytes()
    for seed in (0, 1)
    for tensor in named_weights.named_state_dict("micro", seed).values()
  ]
  path = tmp_path_factory.mktemp("authors") / "checkpoint_micro.pth"
  data = (GOLDEN / "checkpoint_micro.pkl").read_bytes()
  _write_archive(path, data, records, "checkpoint_micro/")
  return path


@pytest.fixture(scope="session")
def small():
  """A classifier of two stages that no preset has."""
  config = smj.ModelConfig(
    dims=(4, 4),
    depths=(1, 2),
    num_classes=3,
    mixer=smj.StructureAwareConfig(d_state=2),
    mlp_ratio=3.3,
  )
  return smj.SpatialMamba(config, rngs=nnx.Rngs(0))


def _filled(config, out_indices=()):
  """A model with random arrays, made without compiling its initialisation."""
  model = abstract_model(config, out_indices)
  rng = np.random.default_rng(0)
  for _, variable in variables(model):
    values = rng.standard_normal(variable.shape)
    variable.set_value(jnp.asarray(values, variable.dtype))
  return model


@pytest.fixture(scope="session")
def small_vmamba():
  """A VMamba of two stages with the mixer of the first models."""
  return _filled(
    get_model_config(
      "vmamba_micro",
      dims=(4, 4),
      depths=(1, 2),
      num_classes=3,
      d_state=2,
      expand=3,
      gate=True,
      conv_bias=True,
      mlp_ratio=3.3,
    )
  )


@pytest.fixture(scope="session", params=["small", "small_vmamba"])
def each_small(request):
  """A small classifier of each family."""
  return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["small_backbone", "vmamba"])
def each_backbone(request):
  """A small backbone of each family, with the features of the second stage."""
  if request.param == "small_backbone":
    return request.getfixturevalue(request.param)
  config = get_model_config("vmamba_micro", dims=(4, 4), depths=(1, 2))
  return _filled(config, (1,))


@pytest.fixture(scope="session")
def small_backbone():
  """Its backbone, with the features of the second stage."""
  config = smj.ModelConfig(dims=(4, 4), depths=(1, 2))
  return smj.SpatialMambaBackbone(config, out_indices=(1,), rngs=nnx.Rngs(0))
