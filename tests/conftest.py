"""Settings of every test, golden values, and a small tree of images."""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

# Only JAX 0.12 interprets GPU kernels. Their warpgroups wait for one another in
# XLA's threads, of which a machine of two cores has too few.
if jax.__version_info__ >= (0, 12):
  os.environ.setdefault("PJRT_NPROC", "8")

GOLDEN = pathlib.Path(__file__).parent / "golden"


# Bytes of memory that a worker may keep from one test to the next.
KEPT = 3 * 2**29


@pytest.fixture(autouse=True)
def _drop_programs():
  """Drops compiled programs if the worker has grown beyond `KEPT`."""
  yield
  if resident_bytes() > KEPT:
    jax.clear_caches()
    gc.collect()
    # Otherwise the allocator keeps the memory; huge pages make it worse.
    with contextlib.suppress(OSError, AttributeError):
      ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(autouse=True)
def _default_signals():
  """Restores signals that `nohup` or a shell's `&` has set to be ignored."""
  defaults = {
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
  }
  ignored = [x for x in defaults if signal.getsignal(x) is signal.SIG_IGN]
  for number in ignored:
    signal.signal(number, defaults[number])
  yield
  for number in ignored:
    signal.signal(number, signal.SIG_IGN)


def resident_bytes():
  """Returns the memory of this process; 0 if the system does not tell."""
  try:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  except OSError:
    return 0
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def load_golden(name):
  """Loads the arrays of one golden file, {name: array}."""
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
    return dict(arrays)


@pytest.fixture(scope="session")
def golden():
  return load_golden


@pytest.fixture(scope="session")
def named_weights():
  """Returns the module that draws weights and images from names and seeds."""
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


@pytest.fixture
def strict():
  """Runs a test where JAX refuses to promote ranks and types."""
  with (
    jax.numpy_rank_promotion("raise"),
    jax.numpy_dtype_promotion("strict"),
  ):
    yield


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory):
  """3 classes, 4 training and 3 validation images each, in several modes."""
  # Imported here, because kernels are tested in environments without Pillow.
  from PIL import Image

  root = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split, count in (("train", 4), ("val", 3)):
    for class_name in ("n01440764", "n02102040", "n03000684"):
      directory = root / split / class_name
      directory.mkdir(parents=True)
      for i, mode in enumerate(("RGB", "L", "CMYK", "RGB")[:count]):
        # Smooth, because JPEG keeps noise badly.
        corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        size = tuple(int(side) for side in rng.integers(20, 60, 2))
        image = Image.fromarray(corners).resize(size).convert(mode)
        image.save(directory / f"{class_name}_{split}_{i}.JPEG")
  return root
