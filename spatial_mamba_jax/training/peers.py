"""Ends all processes of a run on several hosts when one of them ends."""

import contextlib
import itertools
import json
import os
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

from spatial_mamba_jax.errors import one_line, say

# Seconds between two signs of life of a process.
_PERIOD = 3
# Seconds without a sign of life after which a process counts as dead. A run
# ends within a minute of a death.
_PATIENCE = 40
# Seconds that the first process lives on after a failure. It holds the messages
# of all; at its end JAX ends those that have not read them with a stack trace.
_GRACE = 2 * _PERIOD

# Held by the thread that ends this process, so that only one reports.
_ending = threading.Lock()

# Keys of JAX's store, which all processes of a run share.
_PREFIX = "spatial_mamba_jax/"
_ALIVE = f"{_PREFIX}alive/"
_FAILED = f"{_PREFIX}failed"
# The last sign of a process that ends as it should.
_DONE = "done"


@contextlib.contextmanager
def watching_peers(name: str) -> Iterator[None]:
  """Meanwhile, ends this process when another one fails or dies.

  Otherwise this process would wait in a collective operation: JAX ends it only
  after 100 seconds, with a stack trace. If the first process dies, JAX ends the
  others at once.

  Args:
    name: the name of the command, with which the printed line begins.
  """
  if jax.process_count() == 1:
    yield
    return
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(name, done), daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    # A thread in a call of JAX's would abort the process at its end.
    thread.join()
    # This process may wait long for the others, which still write files.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      _client().key_value_set(_own_key(), _DONE, allow_overwrite=True)


def end_with_peers(
  name: str, error: Exception, *, is_mistake: bool
) -> NoReturn:
  """Ends this process and all others, with the same line on standard error.

  Args:
    name: the name of the command, with which the line begins.
    error: what happened; its attribute `status` is the exit status.
    is_mistake: whether it needs no traceback.
  """
  cause = error.__cause__
  if isinstance(cause or error, jax.errors.JaxRuntimeError):
    # A collective operation can fail because a process has died. The watching
    # thread will know which one, and ends this process.
    time.sleep(_PATIENCE + 2 * _PERIOD)
  message, status = one_line(error), getattr(error, "status", 2)
  failure = json.dumps([jax.process_index(), message, status])
  try:
    _client().key_value_set(_FAILED, failure)
  except jax.errors.JaxRuntimeError:
    # Another process failed first: the watching thread prints that message.
    time.sleep(2 * _PERIOD)
  _end(name, message, status, None if is_mistake else error)


def _client() -> Any:
  # JAX has no public name for it; Orbax uses the same.
  return distributed.global_state.client


def _own_key() -> str:
  return f"{_ALIVE}{jax.process_index()}"


def _end(
  name: str, message: str, status: int, error: Exception | None = None
) -> NoReturn:
  _ending.acquire()
  if error is not None:
    traceback.print_exception(error)
  say(f"{name}: {message}")
  if not jax.process_index():
    time.sleep(_GRACE)
  # Not `sys.exit`, which would wait for the other processes.
  os._exit(status)


def _watch(name: str, done: threading.Event) -> None:
  client = _client()
  signs: dict[str, tuple[str, float]] = {}
  for count in itertools.count():
    values = {}
    # An error may be of a short fault of the network. If the first process has
    # died, JAX itself ends this one.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.key_value_set(_own_key(), str(count), allow_overwrite=True)
      values = dict(client.key_value_dir_get(_PREFIX))
    if failure := values.pop(_FAILED, None):
      process, message, status = json.loads(failure)
      if process != jax.process_index():  # Else the main thread ends it.
        _end(name, message, status)
    if dead := _silent(values, signs):
      _end(
        name,
        f"process {dead.removeprefix(_ALIVE)} has ended or hangs: end all"
        " processes; the same commands resume from the last checkpoint",
        1,
      )
    if done.wait(_PERIOD):
      return


def _silent(
  values: dict[str, str], signs: dict[str, tuple[str, float]]
) -> str | None:
  """Returns the key of a process without a new sign of life, if any.

  Args:
    values: the last sign of each process.
    signs: the same from earlier calls, with the time of the first; updated.
  """
  now = time.monotonic()
  for key, sign in values.items():
    if signs.get(key, ("", now))[0] != sign:
      signs[key] = (sign, now)
    elif sign != _DONE and now - signs[key][1] > _PATIENCE:
      return key
  return None
