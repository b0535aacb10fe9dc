"""Runs that are told to stop: by a signal, to this process or to any."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class StoppedError(Exception):
  """The run was told to stop, and saved itself first."""

  def __init__(self, message: str, stopped_by: signal.Signals):
    super().__init__(message)
    self.signal = stopped_by
    # The exit status of a command that it ends, as a shell has it.
    self.status = 128 + stopped_by


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
  """A list of the signals to stop that have come; a second one stops at once.

  Of several processes, only one may see a signal: there JAX's own handler of
  SIGTERM lets all stop after the same step.
  """
  received: list[signal.Signals] = []
  if jax.process_count() > 1:
    yield received
    return

  def note(number, frame):
    del frame
    received.append(signal.Signals(number))
    signal.signal(number, before[number])

  before = {
    number: signal.signal(number, note)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def stop_requested(
  received: list[signal.Signals], step: int
) -> signal.Signals | None:
  """The signal by which all processes are to stop after this step, if any."""
  if jax.process_count() > 1:
    stop = multihost_utils.reached_preemption_sync_point(step)
    return signal.SIGTERM if stop else None
  return received[0] if received else None
