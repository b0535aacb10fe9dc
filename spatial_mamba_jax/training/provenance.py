"""The package versions and the commit of a run or a measurement."""

import importlib.metadata
import os
import pathlib
import subprocess
from collections.abc import Sequence


def versions(packages: Sequence[str]) -> dict[str, str]:
  """Returns {name: version} for the packages that are installed."""
  return {
    name: importlib.metadata.version(name)
    for name in packages
    if is_installed(name)
  }


def is_installed(package: str) -> bool:
  """Whether a package is installed, by its name on PyPI."""
  try:
    importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def commit() -> str | None:
  """Returns the commit of this project's checkout.

  "-dirty" is appended if tracked files have changed. The result is None if the
  project is installed as a package.
  """
  root = pathlib.Path(__file__).parents[2]
  # An installed package may be inside another repository, or be copied into it.
  if not (root / ".git").exists() or _git(root, "ls-files", __file__) is None:
    return None
  return _git(
    root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
  )


def _git(root: pathlib.Path, *arguments: str) -> str | None:
  """Returns the output of git; None if it fails or is empty."""
  # In a git hook, these variables name another repository.
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
