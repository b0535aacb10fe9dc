"""Invalid architectures are refused before anything is created."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from spatial_mamba_jax.models.config import ModelConfig
from spatial_mamba_jax.models.mixers import SS2DConfig, StructureAwareConfig
from spatial_mamba_jax.models.presets import get_model_config

SMALL = ModelConfig(dims=(4, 4), depths=(1, 2))


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("dims", (), "dims and depths must name the same stages"),
    ("dims", (4,), "dims and depths must name the same stages"),
    ("dims", (5, 4), "dims[0] must be even"),
    ("dims", (4, 0), "dims must be at least 1, got (4, 0)"),
    ("dims", (4, 10**6), "dims must be at most 16384, got (4, 1000000)"),
    ("depths", (1, 9999), "depths must be at most 1024, got (1, 9999)"),
    ("depths", (1000, 25), "depths must be at most 1024 blocks in all, got"),
    ("num_classes", 10**9, "num_classes must be at most 1048576"),
    ("mlp_ratio", math.inf, "mlp_ratio must be at most 64, got inf"),
    ("mlp_ratio", 0.1, "mlp_ratio must leave a hidden channel of 4, got 0.1"),
    ("drop_path_rate", math.nan, "drop_path_rate must be a number, got nan"),
    ("dtype", None, "dtype must be one of bfloat16, float16, float32, float64"),
    ("dtype", "float8_e4m3fn", "dtype must be one of"),
    ("dtype", "float31", "dtype must be one of"),
    ("dtype", jnp.complex64, "dtype must be one of"),
    ("dtype", [1], "dtype must be one of"),
    ("layer_implementation", "cuda", "layer_implementation must be one of xla"),
    ("in_channels", 0, "in_channels must be at least 1, got 0"),
  ],
)
def test_a_wrong_field_is_named(field, value, message):
  with pytest.raises(ValueError, match="must") as caught:
    dataclasses.replace(SMALL, **{field: value})
  assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("d_state", 10**6, "mixer.d_state must be at most 1024, got 1000000"),
    ("expand", 0, "mixer.expand must be at least 1, got 0"),
    ("implementation", "cuda", "mixer.implementation must be one of xla, "),
    ("stages", 4, "'stages' is no field of a model; "),
  ],
)
def test_fields_of_the_mixer_go_by_their_own_names(field, value, message):
  with pytest.raises(ValueError, match=r"must|no field") as caught:
    get_model_config("spatial_mamba_micro", **{field: value})
  assert str(caught.value).startswith(message)
  config = get_model_config("spatial_mamba_micro", d_state=3, num_classes=2)
  assert config.mixer == StructureAwareConfig(d_state=3)
  assert config.num_classes == 2


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class WithRatio(StructureAwareConfig):
  """A mixer with a field that the model has too."""

  mlp_ratio: float = 1.0


@dataclasses.dataclass(kw_only=True)
class Unhashable(StructureAwareConfig):
  pass


def test_a_mixer_keeps_its_fields():
  mixer = WithRatio(mlp_ratio=2.0)
  config = get_model_config("spatial_mamba_micro", mixer=mixer, mlp_ratio=3.0)
  assert (config.mlp_ratio, config.mixer.mlp_ratio) == (3.0, 2.0)
  with pytest.raises(ValueError, match="Unhashable must be a dataclass"):
    get_model_config("spatial_mamba_micro", mixer=Unhashable())
  with pytest.raises(ValueError, match=r"MixerConfig or one of .*, got 'x'"):
    get_model_config("spatial_mamba_micro", mixer="x")


def test_a_mixer_by_its_name():
  config = get_model_config("spatial_mamba_micro", mixer="ss2d", gate=True)
  assert config.mixer == SS2DConfig(gate=True)


def test_numpy_scalars_and_arrays_are_accepted():
  config = get_model_config(
    "spatial_mamba_micro",
    dims=np.array([4, 4]),
    depths=[np.int64(1), 2],
    num_classes=np.int64(3),
    mlp_ratio=np.float32(2),
    dtype=jnp.bfloat16,
  )
  assert config == ModelConfig(
    dims=(4, 4), depths=(1, 2), num_classes=3, mlp_ratio=2.0, dtype=jnp.bfloat16
  )


def test_float64_needs_x64(request):
  assert ModelConfig(dims=(4,), depths=(1,), dtype="float64").dtype == "float64"
  with pytest.raises(ValueError, match="unless JAX_ENABLE_X64=1"):
    get_model_config("spatial_mamba_micro", dtype="float64")
  request.getfixturevalue("x64")
  config = get_model_config("spatial_mamba_micro", dtype="float64")
  assert config.dtype == jnp.float64
