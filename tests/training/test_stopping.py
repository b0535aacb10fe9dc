"""Signals: the first lets a run save, a second one ends the process."""

import os
import signal
import subprocess
import sys

import pytest

# A long call outside Python, during which Python's handlers do not run; then a
# loop that ends with the first signal, as a run's does.
SCRIPT = """
import hashlib, signal, sys, time
from spatial_mamba_jax.training.stopping import (
  end_on_signals, stop_requested, stop_signals,
)
if "ignore" in sys.argv:
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
end_on_signals("script")

def compute():
  print("ready", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

def wait(stopping):
  print("ready", flush=True)
  while not stop_requested(stopping, 1):
    time.sleep(0.01)
  print("saving", stopping[0].name, flush=True)
  while True:
    time.sleep(0.01)

if "loop" in sys.argv:
  with stop_signals() as stopping:
    wait(stopping) if "python" in sys.argv else compute()
else:
  compute()
"""


@pytest.fixture
def start():
  """Starts the script; ends it with the test."""
  started = []

  def start(*arguments):
    process = subprocess.Popen(
      (sys.executable, "-c", SCRIPT, *arguments),
      env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    assert process.stdout.readline() == "ready\n"
    return process

  yield start
  for process in started:
    with process:
      process.kill()


def assert_ended(process, number):
  out, err = process.communicate(timeout=120)
  assert (process.returncode, out) == (128 + number, "")
  assert err == f"script: stopped by {number.name}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_with_a_closed_standard_error(start, number):
  process = start()
  process.stderr.close()
  process.send_signal(number)
  assert process.wait(120) == 128 + number


def is_alive(process, seconds=1.0):
  try:
    process.wait(seconds)
  except subprocess.TimeoutExpired:
    return True
  return False


@pytest.mark.parametrize(
  "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
)
def test_one_signal_ends_a_process_with_nothing_to_save(start, number):
  process = start()
  process.send_signal(number)
  assert_ended(process, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_compilation(start, number):
  process = start("loop")
  process.send_signal(number)
  assert is_alive(process)
  process.send_signal(number)
  assert_ended(process, number)


def test_a_second_sighup_does_not_end_the_process(start):
  process = start("loop", "python")
  process.send_signal(signal.SIGHUP)
  assert process.stdout.readline() == "saving SIGHUP\n"
  process.send_signal(signal.SIGHUP)
  process.send_signal(signal.SIGUSR1)
  assert is_alive(process)
  process.send_signal(signal.SIGTERM)
  assert_ended(process, signal.SIGTERM)


def test_a_signal_that_nohup_ignores_stays_ignored(start):
  process = start("loop", "python", "ignore")
  process.send_signal(signal.SIGHUP)
  assert is_alive(process)
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == "saving SIGINT\n"
  process.send_signal(signal.SIGINT)
  assert_ended(process, signal.SIGINT)
