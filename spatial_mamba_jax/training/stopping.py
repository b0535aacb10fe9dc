"""Runs that are told to stop: by a signal, to this process or to any."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax
from jax.experimental import multihost_utils

# SIGHUP comes when a terminal is closed, SIGUSR1 from Slurm ahead of a limit.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# A second one of these ends the process at once. The others may come in pairs:
# of a closed terminal, a process hears from the shell and from the kernel.
_INSISTING = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
  """The run was told to stop, and saved itself first."""

  def __init__(self, message: str, stopped_by: signal.Signals):
    super().__init__(message)
    # The exit status of a command that it ends, as a shell has it.
    self.status = 128 + stopped_by


class _Listeners:
  """Whether a run listens, and saves first when it is told to stop."""

  is_saving_first = False


def end_on_signals(name: str) -> None:
  """Lets a signal to stop end this process at once, unless a run saves first.

  To be called by a script, in its main thread. A thread ends the process, since
  Python's own handlers, and exceptions from them, wait for what XLA compiles.

  Args:
    name: the script's, which begins the line that is printed.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  for number in _heard():
    signal.signal(number, lambda *_: None)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def watch():
    is_stopping = False
    while True:
      number = signal.Signals(os.read(reader, 1)[0])
      if number not in _STOPPING:
        continue
      if _Listeners.is_saving_first and not is_stopping:
        is_stopping = True
      elif number in _INSISTING or not is_stopping:
        with suppress(OSError):  # Closed, as the terminal may be.
          os.write(2, f"{name}: stopped by {number.name}\n".encode())
        os._exit(128 + number)

  threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
  """A list of the signals to stop that have come; a second one stops at once.

  Of several processes, only one may see a signal: there JAX's own handler of
  SIGTERM lets all stop after the same step.
  """
  received: list[signal.Signals] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # Signals are the main thread's.
    return
  is_alone = jax.process_count() == 1
  numbers = [n for n in _heard() if is_alone or n != signal.SIGTERM]

  def note(number, frame):
    del frame
    received.append(signal.Signals(number))
    if number in _INSISTING:
      signal.signal(number, before[number])
    if not is_alone:
      os.kill(os.getpid(), signal.SIGTERM)

  before = {number: signal.signal(number, note) for number in numbers}
  _Listeners.is_saving_first = True
  try:
    yield received
  finally:
    _Listeners.is_saving_first = False
    for number, handler in before.items():
      signal.signal(number, handler)


def stop_requested(
  received: list[signal.Signals], step: int | None = None
) -> signal.Signals | None:
  """The signal by which all processes are to stop after this step, if any.

  Without a step, several processes cannot agree, and go on.
  """
  if jax.process_count() == 1:
    return received[0] if received else None
  if step is None or not multihost_utils.reached_preemption_sync_point(step):
    return None
  return signal.SIGTERM


def _heard() -> list[signal.Signals]:
  """The signals to stop that are not ignored, as nohup ignores SIGHUP."""
  return [n for n in _STOPPING if signal.getsignal(n) != signal.SIG_IGN]
