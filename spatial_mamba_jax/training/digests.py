"""Digests of a checkpoint's files, which show damage before it is used."""

import hashlib
import json
import os
import pathlib

from spatial_mamba_jax.errors import naming, one_line

DIGESTS = "digests.json"
# Files without a digest. Orbax rewrites the second when it renames a finished
# checkpoint.
_WITHOUT_DIGEST = (DIGESTS, "_CHECKPOINT_METADATA")


def write_digests(directory: pathlib.Path) -> None:
  """Writes the SHA-256 of every file in a directory to its `digests.json`.

  Raises:
    OSError: a file cannot be read, or the digests cannot be written.
  """
  digests = {
    path.relative_to(directory).as_posix(): _digest(path)
    for path in sorted(directory.rglob("*"))
    if path.is_file() and path.name not in _WITHOUT_DIGEST
  }
  write_whole(directory / DIGESTS, json.dumps(digests, indent=1))


def add_digest(directory: pathlib.Path, name: str) -> None:
  """Adds the digest of one file to `digests.json`."""
  path = directory / DIGESTS
  digests = json.loads(regular(path).read_text()) if path.exists() else {}
  digests[name] = _digest(directory / name)
  write_whole(path, json.dumps(digests, indent=1))


def find_damage(directory: pathlib.Path) -> str | None:
  """Says what is wrong with the files in a directory; None if nothing is.

  Earlier versions wrote no `digests.json`; the content of such files is not
  checked.
  """
  # Reading a pipe would never end. Files without a digest are read, too.
  try:
    for entry in directory.rglob("*"):
      if not entry.is_dir():
        regular(entry)
  except OSError as error:
    return one_line(error)
  path = directory / DIGESTS
  if not path.exists():
    return None
  try:
    digests = json.loads(regular(path).read_text())
  except (OSError, RecursionError, ValueError):
    return f"{DIGESTS} cannot be read"
  if not isinstance(digests, dict) or not digests:
    return f"{DIGESTS} has no digests"
  for name, digest in digests.items():
    if name.startswith("/") or ".." in name.split("/"):
      return f"{DIGESTS} names {one_line(name)}"
    try:
      if _digest(directory / name) != digest:
        return f"{name} is not what was saved"
    except FileNotFoundError:
      return f"{name} is missing"
    except (OSError, ValueError) as error:
      return f"{name} cannot be read ({one_line(error)})"
  return None


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file atomically: a failure leaves the old file unchanged."""
  partial = path.with_name(f"{path.name}.partial")
  with naming(path):
    try:
      partial.write_bytes(
        content.encode() if isinstance(content, str) else content
      )
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)


def regular(path: pathlib.Path) -> pathlib.Path:
  """Returns the path; raises an OSError where it is a pipe or a device."""
  if path.exists() and not path.is_file():
    raise OSError(f"{path.name} is not a file")
  return path


def _digest(path: pathlib.Path) -> str:
  with regular(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
