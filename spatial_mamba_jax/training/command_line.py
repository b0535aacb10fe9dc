"""What `train.py` and `eval.py` share: flags in, exit status out."""

import logging
import os
import pathlib
import sys
import threading
import warnings
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import config_flags

from spatial_mamba_jax.errors import UserError, run_command
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.training.config import TrainConfig, TrainingError
from spatial_mamba_jax.training.loop import NonFiniteError
from spatial_mamba_jax.training.sharding import initialize_distributed
from spatial_mamba_jax.training.stopping import StoppedError, end_on_signals

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The experiment: a file with get_config()."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Share the work with the processes on other hosts."
)


def run(main: Callable[[], None]) -> int:
  """Parses the flags and calls `main`; a user's mistake becomes one line.

  Returns:
    The exit status: 0, 1 for a run that diverged, 2 for a mistake, 128 more
    than the signal for a run stopped by one (143 for SIGTERM, 130 for Ctrl-C).
  """
  name = pathlib.Path(sys.argv[0]).name
  end_on_signals(name)
  _silence_background()

  def command():
    _parse()
    _use_compilation_cache()
    if _DISTRIBUTED.value:
      initialize_distributed()
    main()

  mistakes = (UserError, OSError, NonFiniteError, StoppedError)
  return run_command(name, command, mistakes)


def config() -> TrainConfig:
  """The experiment, overrides applied and checked."""
  try:
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    if path and not pathlib.Path(path).is_file():
      raise TrainingError(f"--config={path} is no file")
    experiment = CONFIG.value
  except (AttributeError, OSError) as error:
    raise TrainingError(f"--config: {_one_line(error)}") from error
  if not isinstance(experiment, TrainConfig):
    raise TrainingError(
      "--config=FILE is needed, a file whose get_config() returns a"
      " TrainConfig, e.g. configs/digits.py"
    )
  experiment.validate()
  return experiment


def workdir() -> pathlib.Path:
  """The working directory as an absolute path."""
  if not WORKDIR.value:
    raise TrainingError("--workdir=DIR is needed: where the run is kept")
  path = local_path(WORKDIR.value, "--workdir")
  if path.exists() and not path.is_dir():
    raise TrainingError(f"--workdir={WORKDIR.value} is not a directory")
  return path


def _parse() -> None:
  try:
    rest = flags.FLAGS(sys.argv)
  except (
    flags.Error,
    AttributeError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
  ) as error:
    raise TrainingError(_one_line(error)) from error
  if rest[1:]:
    raise TrainingError(f"{rest[1]!r} is no flag; flags look like --name=value")


def _one_line(error: Exception) -> str:
  # A KeyError's str() is the repr of its message.
  message = error.args[0] if isinstance(error, KeyError) else error
  return " ".join(str(message).split())


def _use_compilation_cache() -> None:
  """A second run of the same program need not compile it again."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    cache = home.expanduser() / "spatial_mamba_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def _silence_background() -> None:
  """Leaves the telling of a failure to the main thread, which it reaches."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  hook = sys.unraisablehook

  def of_main_thread(unraisable):
    # Callbacks of TensorStore come in threads of its own: after a failed save,
    # hundreds of them.
    if threading.current_thread() is threading.main_thread():
      hook(unraisable)

  sys.unraisablehook = of_main_thread
