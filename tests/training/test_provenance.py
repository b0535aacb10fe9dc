"""A run names the commit of this project, not of a repository around it."""

import importlib.util
import pathlib
import shutil
import subprocess

import pytest

from spatial_mamba_jax.training import provenance

FILE = pathlib.Path("spatial_mamba_jax", "training", "provenance.py")


def git(directory, *arguments):
  identity = ("-c", "user.name=x", "-c", "user.email=x@x")
  return subprocess.run(
    ("git", "-C", directory, *identity, *arguments),
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()


def commit_of(root):
  """Returns the commit that the module finds below a directory."""
  path = root / FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  shutil.copy(provenance.__file__, path)
  spec = importlib.util.spec_from_file_location("copied", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.commit()


@pytest.fixture
def repository(tmp_path):
  (tmp_path / ".gitignore").write_text(".venv\nlib\n")
  git(tmp_path, "init", "-q")
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "-qm", "a project of one's own")
  return tmp_path


@pytest.mark.parametrize("place", [".venv/lib/site-packages", "lib", "."])
def test_a_repository_around_an_installation_is_not_named(repository, place):
  assert commit_of(repository / place) is None


def test_a_checkout_names_its_commit(repository, monkeypatch):
  commit_of(repository)
  git(repository, "add", ".")
  git(repository, "commit", "-qm", "this project")
  head = git(repository, "rev-parse", "HEAD")
  # A hook of another repository sets these.
  monkeypatch.setenv("GIT_DIR", "/nowhere")
  assert commit_of(repository) == head
  (repository / ".gitignore").write_text("")
  assert commit_of(repository) == f"{head}-dirty"


def test_without_git_there_is_no_commit(repository, monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert commit_of(repository) is None
