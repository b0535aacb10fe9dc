"""Paths as people write them."""

import pathlib
import re

from spatial_mamba_jax.data.config import DataError

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def local_path(path: str, field: str) -> pathlib.Path:
  """A path on this machine, its `~` expanded.

  Args:
    path: as the user wrote it.
    field: the setting it is the value of.

  Raises:
    DataError: if it is remote, is no path, or has a `~` but there is no such
      home directory.
  """
  if _REMOTE.match(path):
    raise DataError(
      f"{field} must be a directory of this machine, got {path}: copy it here, "
      "or mount it"
    )
  if "\0" in path:
    raise DataError(f"{field} must be a path, got {path!r}")
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:
    raise DataError(
      f"there is no home directory for {path}: set {field}"
    ) from None
