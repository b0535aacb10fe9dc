"""Runs work in a process of its own, because it may crash or hang.

After an access out of bounds, a GPU computes nothing more for its process. A
kernel that waits for a signal that never comes never ends.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

# Seconds for a finished or crashed process to release the device.
SECONDS_TO_END = 10


class EndedError(Exception):
  """The process ended before its work did."""


def messages(work: Callable[..., None], *, patience: float) -> Iterator[Any]:
  """Yields each message that `work(send)` sends.

  Args:
    work: a function that another process can import.
    patience: seconds to wait for each message before the process is killed.

  Raises:
    EndedError: the process was killed, or crashed.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_work, args=(work, sender))
  process.start()
  # The pipe must close when the process ends.
  sender.close()
  try:
    while (message := _receive(receiver, process, patience)) is not None:
      yield message
    process.join(SECONDS_TO_END)
  finally:
    process.kill()
    process.join(SECONDS_TO_END)
    receiver.close()


def _work(work, sender):
  work(sender.send)
  sender.send(None)


def _receive(receiver, process, patience):
  try:
    if receiver.poll(patience):
      return receiver.recv()
  # A killed process may have sent half a message.
  except (EOFError, OSError) as error:
    process.join(SECONDS_TO_END)
    why = f"its process ended with status {process.exitcode}"
    raise EndedError(why) from error
  raise EndedError(f"nothing came for {patience:g} s")
