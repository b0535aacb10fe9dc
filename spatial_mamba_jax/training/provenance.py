"""Versions and commit of a run or a measurement."""

import importlib.metadata
import os
import pathlib
import subprocess
from collections.abc import Sequence


def versions(packages: Sequence[str]) -> dict[str, str]:
  """{name: version} of those of the packages that are installed."""
  return {
    name: importlib.metadata.version(name)
    for name in packages
    if is_installed(name)
  }


def is_installed(package: str) -> bool:
  """Whether a package of this name, as in a registry, is installed."""
  try:
    importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def commit() -> str | None:
  """The commit of this project's checkout; None where it is installed.

  It ends in "-dirty" where tracked files were changed.
  """
  root = pathlib.Path(__file__).parents[2]
  # A repository may lie around an installed package, or have copies of it.
  if not (root / ".git").exists() or _git(root, "ls-files", __file__) is None:
    return None
  return _git(
    root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
  )


def _git(root: pathlib.Path, *arguments: str) -> str | None:
  """What git prints about a checkout; None where that is nothing."""
  # Variables of a hook that calls this would name another repository.
  environment = {k: x for k, x in os.environ.items() if k[:4] != "GIT_"}
  try:
    return (
      subprocess.run(
        ("git", *arguments),
        cwd=root,
        env=environment,
        capture_output=True,
        check=True,
        text=True,
      ).stdout.strip()
      or None
    )
  except (OSError, subprocess.CalledProcessError):
    return None
