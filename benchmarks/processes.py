"""Work in a process of its own, because it may crash, or never end.

After its first access out of bounds a GPU computes nothing more for a process,
and a kernel that waits for what does not come waits forever.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

# For a process that has done its work, or crashed, to let go of the device.
SECONDS_TO_END = 10


class EndedError(Exception):
  """The process did not come to the end of its work."""


def messages(work: Callable[..., None], *, patience: float) -> Iterator[Any]:
  """What `work(send)` sends, as it comes.

  Args:
    work: what another process can import.
    patience: seconds to wait for each message before the process is ended.

  Raises:
    EndedError: it was, or crashed.
  """
  context = multiprocessing.get_context("spawn")
  receiver, sender = context.Pipe(duplex=False)
  process = context.Process(target=_work, args=(work, sender))
  process.start()
  # So that none holds it but the process.
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
  # A process that is killed may have sent half a message.
  except (EOFError, OSError) as error:
    process.join(SECONDS_TO_END)
    why = f"its process ended with status {process.exitcode}"
    raise EndedError(why) from error
  raise EndedError(f"nothing came for {patience:g} s")
