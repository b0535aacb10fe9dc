"""A working directory, which one run holds at a time."""

import fcntl
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
from typing import Any

import jax

from spatial_mamba_jax.errors import reason, say
from spatial_mamba_jax.paths import make_directory
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.processes import from_first_process

_LOCK = "lock"
# Seconds between a holder's signs of life, and without one until it is dead.
_BEAT = 5.0
_SILENCE = 30.0


class WorkdirLock:
  """Holds a working directory for this process while it is entered.

  The lock is a file that names its holder. On one machine the kernel knows
  whether the holder lives (`flock`). A holder on another machine touches the
  file every few seconds, and is taken for dead after half a minute without. Of
  several processes of a run the first one holds the lock.
  """

  def __init__(self, workdir: pathlib.Path):
    """Does nothing yet."""
    self._path = workdir / _LOCK
    self._holder = json.dumps(
      {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "since": time.time(),
      }
    ).encode()
    self._ended = threading.Event()

  def __enter__(self) -> "WorkdirLock":
    """Creates the directory and takes the lock.

    Raises:
      TrainingError: the directory cannot be written, or another run holds it.
    """
    from_first_process(self._open)
    return self

  def __exit__(self, *error: object) -> None:
    if jax.process_index():
      return
    self._ended.set()
    with self._file:
      if self._read() == self._holder:
        self._file.truncate(0)

  def check(self) -> None:
    """Raises a TrainingError where another run has taken the lock.

    A lock that cannot be read, or was removed, is no reason to end a run.
    """
    from_first_process(self._check)

  def _check(self) -> None:
    content = self._read()
    holder = _parse(content)
    if holder and content != self._holder:
      raise TrainingError(
        f"{self._path.parent} was taken over by {_describe(holder)}"
      )

  def _open(self) -> None:
    workdir = self._path.parent
    try:
      make_directory(workdir)
      if self._path.exists() and not self._path.is_file():
        raise TrainingError(
          f"cannot write to {workdir}: {self._path} is no file, move it away"
        )
      self._file = self._path.open("a+b", buffering=0)
      try:
        self._take()
      except BaseException:
        self._file.close()
        raise
    except OSError as error:
      raise TrainingError(
        f"cannot write to {workdir}: {reason(error, workdir)}"
      ) from error
    threading.Thread(target=self._beat, daemon=True).start()

  def _take(self) -> None:
    holder = _parse(self._read())
    is_locked = self._lock_by_kernel(holder)
    is_dead = is_locked and holder and holder.get("machine") == _machine()
    if holder and not is_dead and self._lives(holder):
      raise self._refusal(holder)
    self._file.truncate(0)
    self._file.write(self._holder)

  def _lock_by_kernel(self, holder: dict[str, Any] | None) -> bool:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise self._refusal(holder) from error
    except OSError:  # The file system has no such locks.
      return False
    return True

  def _lives(self, holder: dict[str, Any]) -> bool:
    """Waits for a sign of life of a holder that the kernel does not know."""
    last = self._touched()
    # By the clock of the file system, which may be another machine's.
    with tempfile.NamedTemporaryFile(dir=self._path.parent) as file:
      silence = os.fstat(file.fileno()).st_mtime - last
    left = min(_SILENCE, _SILENCE - silence)
    if left > 0:
      say(
        f"waiting {left:.0f} s for a sign of life of {_describe(holder)}, which"
        f" held {self._path.parent}"
      )
    until = time.monotonic() + left
    while time.monotonic() < until:
      time.sleep(min(1.0, left))
      if self._touched() != last:
        return True
    return False

  def _touched(self) -> float:
    # Opened anew, because network file systems look for changes only then.
    with self._path.open("rb") as file:
      return os.fstat(file.fileno()).st_mtime

  def _read(self) -> bytes:
    try:
      return self._path.read_bytes()
    except OSError:
      return b""

  def _refusal(self, holder: dict[str, Any] | None) -> TrainingError:
    return TrainingError(
      f"{self._path.parent} is in use by {_describe(holder)}: stop that run, or"
      " choose another workdir"
    )

  def _beat(self) -> None:
    while not self._ended.wait(_BEAT):
      try:
        os.utime(self._file.fileno())
      except (OSError, ValueError):  # Closed meanwhile, or out of reach.
        continue


def _machine() -> str:
  """Names this machine since it was started, for all its containers."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return socket.gethostname()


def _parse(content: bytes) -> dict[str, Any] | None:
  try:
    holder = json.loads(content)
  except (RecursionError, ValueError):
    return None
  return holder if isinstance(holder, dict) else None


def _describe(holder: dict[str, Any] | None) -> str:
  if not holder:
    return "another run"
  return f"the run of {holder.get('host')}, process {holder.get('pid')}"
