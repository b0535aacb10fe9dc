"""Settings of every test, and the golden numbers of the authors' model."""

import functools
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def load_golden(name):
  """The arrays of one golden file, {name: array}."""
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
    return dict(arrays)


@pytest.fixture(scope="session")
def golden():
  return load_golden


@pytest.fixture(scope="session")
def named_weights():
  """The module that makes weights and images from names and seeds."""
  spec = importlib.util.spec_from_file_location(
    "named_weights", GOLDEN / "named_weights.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def x64():
  """Runs a test in double precision."""
  with jax.enable_x64(True):
    yield
