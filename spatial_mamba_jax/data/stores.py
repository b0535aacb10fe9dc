"""Reads files of this machine, and objects of Google Cloud Storage.

Records are read by array_record, which knows `gs://` itself; their metadata is
read here by TensorStore, which Orbax brings. Both take the application default
credentials of Google Cloud.
"""

import errno
import os
import pathlib

from etils import epath

from spatial_mamba_jax.errors import UserError, one_line
from spatial_mamba_jax.paths import local_path

_GCS = "gs://"
# Failed requests that are repeated, after up to 32 s each.
_RETRIES = 4


def location(path: str, field: str) -> pathlib.PurePath:
  """Returns a path of this machine, or a `gs://` path.

  Args:
    path: the path as the user wrote it.
    field: the name of the setting, for messages.

  Raises:
    UserError: the path is another URL or is malformed.
  """
  if not path.startswith(_GCS):
    return local_path(path, field)
  if not path.removeprefix(_GCS).strip("/") or "\0" in path:
    raise UserError(f"{field} must be gs://BUCKET/DIRECTORY, got {path!r}")
  return epath.Path(path)


def is_remote(path: pathlib.PurePath) -> bool:
  """Returns whether a path is in Google Cloud Storage."""
  return str(path).startswith(_GCS)


def exists(path: pathlib.PurePath) -> bool:
  """Returns whether there is a file (or object), or a local directory."""
  if not is_remote(path):
    return os.path.lexists(path)
  try:
    read(path, 1)
  except FileNotFoundError:
    return False
  return True


def read(path: pathlib.PurePath, most: int) -> bytes:
  """Reads the first `most` bytes of a file or object.

  Raises:
    OSError: it is missing or cannot be read.
  """
  if is_remote(path):
    return _read_object(str(path), most)
  with open(path, "rb") as file:
    return file.read(most)


def _read_object(url: str, most: int) -> bytes:
  import tensorstore as ts  # Imported here, because it takes long.

  bucket, _, key = url.removeprefix(_GCS).partition("/")
  spec = {
    "driver": "gcs",
    "bucket": bucket,
    "context": {"gcs_request_retries": {"max_retries": _RETRIES}},
  }
  try:
    store = ts.KvStore.open(spec).result()
    found = store.read(key).result()
  except Exception as error:  # TensorStore raises ValueError for any failure.
    raise OSError(errno.EIO, one_line(error), url) from error
  if found.state == "missing":
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
  return found.value[:most]
