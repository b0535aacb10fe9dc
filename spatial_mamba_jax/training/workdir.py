"""The lock on a working directory, which one run uses at a time."""

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
# Seconds between two heartbeats of a holder, and seconds without a heartbeat
# after which it is considered dead.
_BEAT = 5.0
_SILENCE = 30.0


class WorkdirLock:
  """Locks a working directory for this process, as a context manager.

  The lock is a file that names its holder. On the same machine, `flock` tells
  whether the holder is alive. A holder on another machine updates the file's
  modification time every few seconds, its heartbeat, and is considered dead
  after 30 seconds without. Of several processes of a run, the first one holds
  the lock.
  """

  def __init__(self, workdir: pathlib.Path):
    """Does not take the lock yet."""
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
    """Raises a TrainingError if another run has taken the lock.

    A lock that was removed or cannot be read does not end the run.
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
          f"cannot write to {workdir}: {self._path} is not a file, move it away"
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
    is_locked = self._flock(holder)
    is_dead = is_locked and holder and holder.get("machine") == _machine()
    if holder and not is_dead and self._is_alive(holder):
      raise self._refusal(holder)
    self._file.truncate(0)
    self._file.write(self._holder)

  def _flock(self, holder: dict[str, Any] | None) -> bool:
    """Whether the kernel locks the file; not all file systems support it."""
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise self._refusal(holder) from error
    except OSError:  # The file system does not support flock.
      return False
    return True

  def _is_alive(self, holder: dict[str, Any]) -> bool:
    """Waits for a heartbeat of a holder on another machine."""
    last = self._last_beat()
    # The clock of the file system, which may be another machine's.
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
      if self._last_beat() != last:
        return True
    return False

  def _last_beat(self) -> float:
    # Opened each time, because network file systems refresh times on opening.
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
      except (OSError, ValueError):  # The file is closed or unreachable.
        continue


def _machine() -> str:
  """Returns an ID of this machine since its boot, the same in containers."""
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
