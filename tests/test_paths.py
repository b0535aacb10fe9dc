"""Paths that a user names."""

import os
import pathlib
import pwd

import pytest

from spatial_mamba_jax.errors import UserError
from spatial_mamba_jax.paths import local_path, make_directory


def test_a_path_becomes_absolute(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  for path, expected in (
    ("runs/a", tmp_path / "runs" / "a"),
    (pathlib.Path("runs"), tmp_path / "runs"),
    ("~/runs", tmp_path / "home" / "runs"),
    ("/data/../runs", pathlib.Path("/data/../runs")),
    ("gs", tmp_path / "gs"),
    ("a:b", tmp_path / "a:b"),
  ):
    assert local_path(path) == expected


@pytest.mark.parametrize(
  "url", ["gs://bucket/run", "s3://bucket", "file:///data", "hdfs://a/b"]
)
def test_a_url_is_refused(url):
  for path in (url, pathlib.Path(url)):
    with pytest.raises(UserError, match="a directory of this machine, got"):
      local_path(path)


def test_no_home_directory_is_a_mistake(monkeypatch):
  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.delenv("HOME")
  monkeypatch.setattr(pwd, "getpwuid", unknown)
  with pytest.raises(UserError, match="no home directory for ~/runs: set dir"):
    local_path("~/runs", "dir")
  assert local_path("runs") == pathlib.Path(os.getcwd(), "runs")


def test_a_file_instead_of_a_directory_is_refused(tmp_path):
  make_directory(tmp_path / "a" / "b")
  make_directory(tmp_path / "a")  # It may exist.
  file = tmp_path / "file"
  file.write_text("")
  for path in (file, file / "below"):
    with pytest.raises(NotADirectoryError, match="Not a directory"):
      make_directory(path)
