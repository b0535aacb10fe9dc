"""Mistakes of a user, each reported in one line."""

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

# The extra of pyproject.toml that installs each module.
_EXTRAS = {
  **dict.fromkeys(
    (
      "PIL", "absl", "array_record", "grain", "importlib_resources",
      "matplotlib", "ml_collections", "orbax", "safetensors", "scipy",
      "sklearn", "tensorboardX", "tensorflow_datasets", "tqdm",
    ),
    "train",
  ),
  **dict.fromkeys(("flatbuffers", "onnx"), "export"),
  "huggingface_hub": "hub",
  "simplejpeg": "fast",
}  # fmt: skip


class UserError(ValueError):
  """A mistake of the user. The message says how to correct it."""


def one_line(message: object) -> str:
  """Returns a message, or the message of an exception, as one printable line.

  White space becomes single spaces. Characters that are not printable, such as
  a terminal's escape sequences in a file's name, are escaped.
  """
  # A KeyError's str() is the repr of its message.
  if isinstance(message, KeyError) and message.args:
    message = message.args[0]
  if isinstance(message, OSError) and message.strerror:
    message = _system_message(message)
  text = " ".join(str(message).split())
  if not text and isinstance(message, BaseException):
    text = type(message).__name__
  return "".join(
    c
    if c.isprintable()
    else c.encode("unicode_escape", "surrogatepass").decode()
    for c in text
  )


def tell(text: str) -> None:
  """Prints a command's result on standard output.

  Raises:
    OSError: standard output is full or closed.
  """
  with naming("standard output"):
    print(text, flush=True)


def reason(error: OSError, path: str | os.PathLike[str]) -> str:
  """Returns the message of an error, without the path where it is `path`.

  This is for messages that name `path` themselves.
  """
  if error.strerror and error.filename in (None, path, os.fspath(path)):
    return error.strerror
  return one_line(error)


def _system_message(error: OSError) -> str:
  """Returns the file and the system's message, without the error number."""
  if error.filename is None:
    return str(error.strerror)
  return f"{os.fsdecode(error.filename)}: {error.strerror}"


def say(line: str) -> None:
  """Prints a line on standard error; does nothing where it is closed."""
  # sys.stderr is None if it was closed when Python started. print() would then
  # choose standard output.
  if sys.stderr is not None:
    with contextlib.suppress(OSError):
      print(one_line(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Sets the file name of an OSError raised inside that has none.

  The system names no file when a write fails, for example on a full disk.
  """
  try:
    yield
  except OSError as error:
    if error.errno and error.filename is None:
      error.filename = os.fspath(path)
    raise


def silence_threads() -> None:
  """Silences the background threads of a command's process.

  Their errors reach the main thread, which reports them. Only a command may
  call this, because it changes logging for the whole process.
  """
  # Orbax logs every exception that it raises, and warns about options that this
  # project sets on purpose.
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", "coroutine .* was never awaited")
  hook = sys.unraisablehook

  def report_in_main_thread(unraisable):
    # After a failure, TensorStore's threads raise hundreds of these.
    if threading.current_thread() is threading.main_thread():
      hook(unraisable)

  sys.unraisablehook = report_in_main_thread


def run_command(
  name: str,
  command: Callable[[], int | None],
  mistakes: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
  """Runs a command; reports a mistake in one line on standard error.

  Args:
    name: the name of the command, with which the line begins.
    command: returns its exit status; None means 0.
    mistakes: the exceptions that a user's mistake raises. An attribute `status`
      of the exception sets the exit status.

  Returns:
    The exit status: the status of `command`, 2 for a mistake (or its `status`),
    130 after Ctrl-C.
  """
  try:
    return command() or 0
  except ModuleNotFoundError as error:
    package = (error.name or "").split(".")[0]
    if package not in _EXTRAS:
      raise
    message = f'{package} is missing: pip install ".[{_EXTRAS[package]}]"'
    status = 2
  except KeyboardInterrupt:
    message, status = "interrupted", 128 + signal.SIGINT
  except mistakes as error:
    message, status = one_line(error), getattr(error, "status", 2)
  say(f"{name}: {message}")
  return status
