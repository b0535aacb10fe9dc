"""Paths that a user names."""

import os
import pathlib
import re

from spatial_mamba_jax.errors import UserError

# A URL, also after pathlib has made one slash of two. One letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """A path as an absolute one, with `~` expanded.

  Raises:
    UserError: the path is a URL, or `~` stands for no directory.
  """
  text = os.fspath(path)
  if _URL.match(text):
    raise UserError(
      f"{text} is a URL, and only paths of this machine are served: mount the"
      " bucket (gcsfuse, mountpoint-s3), and name the directory"
    )
  try:
    return pathlib.Path(text).expanduser().absolute()
  except RuntimeError as error:
    raise UserError(f"{text}: {error}") from error
