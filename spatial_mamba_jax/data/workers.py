"""Prepares the pipeline's worker processes."""

import multiprocessing
import os
import signal
import threading
import warnings
from multiprocessing import resource_tracker


def ignore_pillow_warnings() -> None:
  """Ignores Pillow's warnings, e.g. of odd metadata, if warnings are errors."""
  warnings.filterwarnings("ignore", module=r"PIL\.")


def start_tracker() -> None:
  """Starts the process that tracks the workers' shared memory.

  The tracker must ignore signals to the process group, which the main process
  handles. By itself Python makes it ignore only SIGINT and SIGTERM.
  """
  if threading.current_thread() is not threading.main_thread():
    return
  before = {
    signum: signal.signal(signum, signal.SIG_IGN)
    for signum in (signal.SIGHUP, signal.SIGUSR1)
  }
  resource_tracker.ensure_running()
  for signum, handler in before.items():
    signal.signal(signum, handler)


def start(worker_index: int, worker_count: int) -> None:
  """Prepares a worker process; grain passes the arguments."""
  del worker_index, worker_count
  ignore_pillow_warnings()
  # The accelerator belongs to the main process. If jax is already imported, it
  # has read its variable, but started no backend.
  os.environ["CUDA_VISIBLE_DEVICES"] = ""
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  jax.config.update("jax_platforms", "cpu")
  # Signals reach the whole process group. The main process handles them: it may
  # save first, and then ends its workers.
  for signum in (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
  ):
    signal.signal(signum, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends the worker when the main process ends, even if it was killed."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
