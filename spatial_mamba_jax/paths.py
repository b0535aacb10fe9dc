"""Paths as people write them."""

import errno
import os
import pathlib
import re

from spatial_mamba_jax.errors import UserError

# A URL, also after pathlib has made one slash of two. One letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def make_directory(path: pathlib.Path) -> None:
  """Makes a directory and its parents, if it is not there.

  Raises:
    OSError: it cannot be made, or another file is in its place.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except FileExistsError as error:
    code = errno.ENOTDIR
    raise NotADirectoryError(code, os.strerror(code), error.filename) from error


def local_path(
  path: str | os.PathLike[str], field: str = "the path"
) -> pathlib.Path:
  """A path on this machine as an absolute one, its `~` expanded.

  Args:
    path: as the user wrote it.
    field: the setting it is the value of, for the message.

  Raises:
    UserError: it is a URL, is no path, or has a `~` but there is no such home
      directory.
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
