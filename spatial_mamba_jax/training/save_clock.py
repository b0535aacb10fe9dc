"""The cost of a save: how long the loop waits, how long the disk takes."""

import collections
import pathlib
import time
from typing import NamedTuple


class Save(NamedTuple):
  """The cost of a checkpoint.

  Attributes:
    step: the step of the checkpoint.
    blocked: seconds until the loop could go on.
    durable: seconds until the files of the checkpoint were written.
    bytes: the size of these files.
    is_local: whether they are on the disk of a host, not in the workdir.
  """

  step: int
  blocked: float
  durable: float
  bytes: int
  is_local: bool = False


class SaveClock:
  """Measures saves, which finish in the background in the order they began."""

  def __init__(self):
    """Has measured nothing yet."""
    self._started = 0.0
    self._returned: collections.deque[tuple[int, float, float]] = (
      collections.deque()
    )
    self._written: collections.deque[tuple[float, int]] = collections.deque()

  def start(self) -> None:
    """The loop asks for a save."""
    self._started = time.perf_counter()

  def returned(self, step: int) -> None:
    """The loop may go on."""
    self._returned.append((step, self._started, time.perf_counter()))

  def written(self, directory: pathlib.Path) -> None:
    """All files are written; called in the background."""
    sizes = (x.stat().st_size for x in directory.rglob("*") if x.is_file())
    self._written.append((time.perf_counter(), sum(sizes)))

  @property
  def is_writing(self) -> bool:
    """Whether the loop goes on while files are still written."""
    return len(self._returned) > len(self._written)

  def take(self) -> Save | None:
    """Returns the oldest save that is complete and was not yet taken."""
    if not self._returned or not self._written:
      return None
    step, started, returned = self._returned.popleft()
    written, size = self._written.popleft()
    return Save(step, returned - started, written - started, size)
