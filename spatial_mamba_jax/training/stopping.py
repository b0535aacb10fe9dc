"""Signals that stop a run, sent to this process or to another of the run."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax
from jax.experimental import multihost_utils

# Signals that stop a run. A closed terminal sends SIGHUP; Slurm sends SIGUSR1
# before a time limit.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Signals of which a second one ends the process at once. The others may come
# twice for one event: a closed terminal makes shell and kernel send SIGHUP.
_ENDING_IF_REPEATED = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
  """A signal stopped the run, which is saved."""

  def __init__(self, message: str, stopped_by: signal.Signals):
    super().__init__(message)
    # The exit status of the command, by the convention of shells.
    self.status = 128 + stopped_by


# Set while `stop_signals` is active: a run then saves before it stops.
_saves_first = threading.Event()


def end_on_signals(name: str) -> None:
  """Makes a signal to stop end this process at once, unless a run saves first.

  A script calls this in its main thread. Another thread ends the process,
  because Python's signal handlers do not run while XLA compiles.

  Args:
    name: the name of the script, with which the printed line begins.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  for stop in _not_ignored():
    signal.signal(stop, lambda *_: None)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def watch():
    is_stopping = False
    while True:
      received = signal.Signals(os.read(reader, 1)[0])
      if received not in _STOPPING:
        continue
      if _saves_first.is_set() and not is_stopping:
        is_stopping = True
      elif received in _ENDING_IF_REPEATED or not is_stopping:
        with suppress(OSError):  # Standard error may be a closed terminal.
          os.write(2, f"{name}: stopped by {received.name}\n".encode())
        os._exit(128 + received)

  threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
  """Collects the signals to stop; a second one ends the process at once.

  With several processes, a signal may reach only one of them. That one sends
  itself SIGTERM, and JAX's handler of SIGTERM lets all processes stop after the
  same step.

  Yields:
    The signals received so far.
  """
  received: list[signal.Signals] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # Only the main thread can handle signals.
    return
  is_alone = jax.process_count() == 1
  handled = [x for x in _not_ignored() if is_alone or x != signal.SIGTERM]

  def handle(number, frame):
    del frame
    received.append(signal.Signals(number))
    if number in _ENDING_IF_REPEATED:
      signal.signal(number, before[number])
    if not is_alone:
      os.kill(os.getpid(), signal.SIGTERM)

  before = {stop: signal.signal(stop, handle) for stop in handled}
  _saves_first.set()
  try:
    yield received
  finally:
    _saves_first.clear()
    for stop, handler in before.items():
      signal.signal(stop, handler)


def stop_requested(
  received: list[signal.Signals], step: int | None = None
) -> signal.Signals | None:
  """Returns the signal that stops all processes after this step, if any.

  Args:
    received: the list from `stop_signals`.
    step: the last step taken. Several processes need it to agree on where to
      stop; without it they do not stop.
  """
  if jax.process_count() == 1:
    return received[0] if received else None
  if step is None or not multihost_utils.reached_preemption_sync_point(step):
    return None
  return signal.SIGTERM


def _not_ignored() -> list[signal.Signals]:
  """Returns the signals to stop that are not ignored, as by nohup."""
  return [x for x in _STOPPING if signal.getsignal(x) != signal.SIG_IGN]
