"""The file that an export writes."""

import errno
import importlib
import os
import pathlib
from contextlib import suppress


def check_destination(path: pathlib.Path, package: str = "flatbuffers") -> None:
  """Checks that a file can be written, before a model is traced.

  Args:
    path: the file.
    package: the package that makes the file's content.

  Raises:
    ImportError: the package is not installed.
    OSError: the file cannot be written.
  """
  try:
    importlib.import_module(package)
  except ImportError as error:
    raise ImportError(
      f'{package} is missing: pip install ".[export]"'
    ) from error
  if path.is_dir():
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
  if path.exists() and not path.is_file():
    raise OSError(f"{path} is not a file and is not overwritten")
  replace(path, None)


def replace(path: pathlib.Path, content: bytes | bytearray | None) -> None:
  """Replaces a file atomically; with None, only checks that it could."""
  partial = path.with_name(f".{path.name[:50]}.partial")
  try:
    partial.write_bytes(content or b"")
    if content is not None:
      partial.replace(path)
  except OSError as error:
    error.filename = str(path)  # Not the partial file, which is removed.
    raise
  finally:
    with suppress(OSError):
      partial.unlink()
