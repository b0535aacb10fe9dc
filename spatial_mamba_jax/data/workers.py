"""What a worker process of the pipeline does first."""

import multiprocessing
import os
import signal
import threading
import warnings
from multiprocessing import resource_tracker


def ignore_pillow_warnings() -> None:
  """Odd metadata and the like must not fail where warnings are errors."""
  warnings.filterwarnings("ignore", module=r"PIL\.")


def start_tracker() -> None:
  """Starts the process that tracks the workers' shared memory.

  It ignores the signals that are for the main process. Of those to a process
  group, Python has it ignore SIGINT and SIGTERM alone.
  """
  if threading.current_thread() is not threading.main_thread():
    return
  before = {
    number: signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGHUP, signal.SIGUSR1)
  }
  resource_tracker.ensure_running()
  for number, handler in before.items():
    signal.signal(number, handler)


def start(worker_index: int, worker_count: int) -> None:
  """Prepares a worker process; grain passes arguments it does not need."""
  del worker_index, worker_count
  ignore_pillow_warnings()
  # The accelerator belongs to the main process. If jax was imported on the way
  # here, it has read its variable already, but started no backend.
  os.environ["CUDA_VISIBLE_DEVICES"] = ""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  jax.config.update("jax_platforms", "cpu")
  # Signals reach the whole process group; it is for the main process to decide
  # what they mean, perhaps to save first, and then to end its workers.
  for number in (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
  ):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Without this a worker would outlive a main process that was killed."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
