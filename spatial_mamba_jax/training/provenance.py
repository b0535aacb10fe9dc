"""With what something was trained or measured."""

import importlib.metadata
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
  """The source's git commit, where it is a checkout."""
  try:
    return subprocess.run(
      ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
