"""Paths as users write them: relative, with `~`, or by mistake a URL."""

import errno
import os
import pathlib
import re

from spatial_mamba_jax.errors import UserError

# The beginning of a URL; pathlib turns two slashes into one. One letter and a
# colon would be a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def make_directory(path: pathlib.Path) -> None:
  """Creates a directory and its parents where they do not exist.

  Raises:
    OSError: the directory cannot be created, or the path is another file.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except FileExistsError as error:
    code = errno.ENOTDIR
    raise NotADirectoryError(code, os.strerror(code), error.filename) from error


def local_path(
  path: str | os.PathLike[str], field: str = "the path"
) -> pathlib.Path:
  """Returns a path as an absolute path, with `~` expanded.

  Args:
    path: the path as the user wrote it.
    field: the name of the setting, for messages.

  Raises:
    UserError: the path is a URL, is empty or has a NUL byte, or its home
      directory is unknown.
  """
  text = os.fspath(path)
  if _URL.match(text):
    raise UserError(
      f"{field} must be a directory of this machine, got {text}: copy it here,"
      " or mount it"
    )
  if "\0" in text or not text.strip():
    raise UserError(f"{field} must be a path, got {text!r}")
  try:
    return pathlib.Path(text).expanduser().absolute()
  except RuntimeError:
    raise UserError(
      f"there is no home directory for {text}: set {field}"
    ) from None
