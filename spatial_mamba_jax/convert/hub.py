"""Fetches directories of weights from the Hugging Face hub."""

import hashlib
import os
import pathlib
import re

from spatial_mamba_jax.convert.files import SAFETENSORS
from spatial_mamba_jax.convert.preprocessor_file import PREPROCESSOR
from spatial_mamba_jax.convert.pretrained_config import CONFIG
from spatial_mamba_jax.errors import one_line
from spatial_mamba_jax.paths import local_path

# The files that are fetched; no other file of a repository is needed.
_FILES = (CONFIG, PREPROCESSOR, SAFETENSORS)
_REPOSITORY = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")
_BLOCK = 2**20


def directory_of(
  path: str | os.PathLike[str], revision: str | None = None
) -> pathlib.Path:
  """Returns a local directory, or fetches a repository of the hub.

  A repository that was fetched before is read from huggingface_hub's cache
  where there is no network. What the cache holds is compared with the digests
  of the hub.

  Args:
    path: a directory, or the name of a repository, "org/name".
    revision: branch, tag or commit of a repository; None for its main branch.

  Raises:
    FileNotFoundError: there is neither a directory nor a repository.
    ImportError: huggingface_hub is missing.
    ValueError: a file in the cache is damaged.
  """
  name = os.fspath(path)
  if not _REPOSITORY.fullmatch(name) or os.path.lexists(name):
    local = local_path(path)
    if revision is not None:
      raise ValueError(f"{local} is not on the hub and has no revision")
    if not local.is_dir():
      raise FileNotFoundError(f"{local} is not a directory")
    return local
  directory = _fetch(name, revision)
  for file in _FILES:
    if (directory / file).exists():
      check_digest(directory / file)
  return directory


def _fetch(name: str, revision: str | None) -> pathlib.Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ImportError(
      f"{name} is no directory here; to fetch it from the Hugging Face hub, pip"
      ' install ".[hub]"'
    ) from error
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=list(_FILES)
      )
    )
  except Exception as error:  # Of several packages, for wrong names, networks.
    raise FileNotFoundError(
      f"{name} is no directory here, and cannot be fetched from the Hugging"
      f" Face hub nor found in its cache ({_first_sentence(error)}): check the"
      f" name, or copy the directory from a machine where `hf download {name}`"
      " works"
    ) from error


def _first_sentence(error: Exception) -> str:
  return one_line(error).split(". ")[0].rstrip(".")


def check_digest(path: pathlib.Path) -> None:
  """Compares a file of the cache with the digest that names it there.

  The hub names large files by their SHA-256, and others by git's SHA-1. A file
  that is no link into the cache has no digest.

  Raises:
    ValueError: the content is another one.
  """
  blob = path.resolve()
  if re.fullmatch(r"[0-9a-f]{64}", blob.name):
    digest = hashlib.sha256()
  elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
    digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
  else:
    return
  with blob.open("rb") as file:
    while block := file.read(_BLOCK):
      digest.update(block)
  if digest.hexdigest() != blob.name:
    raise ValueError(
      f"{path} is damaged, its digest differs from the hub's: remove {blob},"
      " and it will be fetched again"
    )
