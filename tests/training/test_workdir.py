"""One run holds a working directory at a time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from spatial_mamba_jax.training import workdir as module
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.workdir import WorkdirLock

HOLDER = """
import pathlib, sys, time
from spatial_mamba_jax.training.workdir import WorkdirLock
with WorkdirLock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
  holder = subprocess.Popen(
    (sys.executable, "-c", HOLDER, tmp_path),
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  try:
    assert holder.stdout.readline() == "held\n"
    with (
      pytest.raises(
        TrainingError,
        match=f"is in use by the run of {os.uname().nodename}, process"
        f" {holder.pid}: ",
      ),
      WorkdirLock(tmp_path),
    ):
      pass
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
  for _ in range(2):  # The lock is free after a kill and after a normal end.
    with WorkdirLock(tmp_path) as lock:
      lock.check()


@pytest.fixture
def other_host(tmp_path, monkeypatch):
  """The lock of a run on another machine, and its file."""
  monkeypatch.setattr(module, "_SILENCE", 2.0)
  path = tmp_path / "lock"
  holder = {"host": "node7", "pid": 12, "machine": "another", "since": 0}
  path.write_text(json.dumps(holder))
  return path


def test_a_lock_of_a_silent_host_is_taken(other_host, capsys):
  os.utime(other_host, (0, 0))
  with WorkdirLock(other_host.parent) as lock:
    lock.check()
  assert not capsys.readouterr().err


@pytest.mark.parametrize("ahead", [0, 10**6])
def test_a_run_waits_for_another_host(other_host, capsys, ahead):
  """The wait is bounded, even if that host's clock is ahead."""
  os.utime(other_host, (time.time() + ahead,) * 2)
  with WorkdirLock(other_host.parent) as lock:
    lock.check()
  (line,) = capsys.readouterr().err.splitlines()
  assert "for a sign of life of the run of node7, process 12" in line


def test_a_lock_of_a_living_host_is_respected(other_host):
  ended = threading.Event()

  def beat():
    while not ended.wait(0.1):
      os.utime(other_host)

  thread = threading.Thread(target=beat)
  thread.start()
  try:
    with (
      pytest.raises(TrainingError, match="in use by the run of node7"),
      WorkdirLock(other_host.parent),
    ):
      pass
  finally:
    ended.set()
    thread.join()
  assert json.loads(other_host.read_text())["host"] == "node7"


def test_the_holder_touches_its_lock(tmp_path, monkeypatch):
  monkeypatch.setattr(module, "_BEAT", 0.01)
  path = tmp_path / "lock"
  with WorkdirLock(tmp_path):
    os.utime(path, (0, 0))
    until = time.monotonic() + 60
    while path.stat().st_mtime == 0:
      assert time.monotonic() < until
      time.sleep(0.01)


def test_a_lost_lock_is_noticed(tmp_path):
  with WorkdirLock(tmp_path) as lock:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "node7", "pid": 12}))
    with pytest.raises(TrainingError, match="taken over by the run of node7"):
      lock.check()
    path.unlink()  # By a user who tidies up.
    lock.check()


@pytest.mark.parametrize("content", ["", "[]", "{", "\0" * 9, "[" * 99_999])
def test_a_damaged_lock_without_a_holder_is_taken(tmp_path, content):
  (tmp_path / "lock").write_text(content)
  with WorkdirLock(tmp_path) as lock:
    lock.check()


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "run" / "lock").mkdir(parents=True)
  (tmp_path / "pipe").mkdir()
  os.mkfifo(tmp_path / "pipe" / "lock")
  for name in ("file/run", "run", "pipe"):
    path = tmp_path / name
    with (
      pytest.raises(TrainingError, match=f"cannot write to {path}"),
      WorkdirLock(path),
    ):
      pass
