"""The ledger of a run: every second is in one part, restarts included."""

import contextlib
import json
import os
import time
import types

import pytest

from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.goodput import Ledger, duration, read_goodput
from spatial_mamba_jax.training.save_clock import Save, SaveClock


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test sets."""
  # A killed process's context must not end, as one that is collected does.
  clock = types.SimpleNamespace(now=1e9, killed=[])
  monkeypatch.setattr(time, "time", lambda: clock.now)
  # Another zero, as in reality.
  monkeypatch.setattr(time, "perf_counter", lambda: clock.now - 7e8)
  return clock


def spend(clock, ledger, part, seconds):
  with ledger.during(part):
    clock.now += seconds


def failing(clock, context, seconds):
  with context:
    clock.now += seconds
    raise KeyError


def run(workdir, clock, *, resumed, windows, killed):
  """One process: 10 s of start, 5 of compilation, windows of ten steps.

  Each window has 6 s of steps, 2 of input; then a save blocks for 1 s.
  """
  started = clock.now
  clock.now += 10.0
  ledger = Ledger(workdir, started)
  opened = ledger.opened(resumed)
  opened.__enter__()
  spend(clock, ledger, "restore", 3.0 if resumed else 0.0)
  spend(clock, ledger, "compile", 5.0)
  with ledger.during("steps"):
    for _ in range(windows):
      spend(clock, ledger, "input", 2.0)
      clock.now += 6.0
      ledger.step += 10
      spend(clock, ledger, "save", 1.0)
      ledger.write()
    clock.now += 0.5  # Since the last record.
  if killed:
    clock.killed.append(opened)
  else:
    opened.__exit__(None, None, None)


def test_a_run_that_was_killed_and_resumed(tmp_path, clock):
  first = clock.now
  run(tmp_path, clock, resumed=0, windows=4, killed=True)
  clock.now += 100.0
  # Its checkpoint of step 40 is not complete. Half of a window is lost.
  run(tmp_path, clock, resumed=35, windows=2, killed=True)
  clock.now += 50.0
  # The checkpoints after step 20 are damaged: twice ten steps of the first
  # process are lost, and all of the second.
  run(tmp_path, clock, resumed=20, windows=3, killed=False)
  goodput = read_goodput(tmp_path)
  assert goodput.starts == 3
  assert goodput.wall == pytest.approx(clock.now - first)
  assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall)
  assert {x: y for x, y in goodput.seconds.items() if y} == pytest.approx(
    {
      "steps": 2 * 6.0 + 3 * 6.0 + 0.5,
      "start": 30.0,
      "compile": 15.0,
      "input": 2.0 * 9,
      "save": 9.0,
      "restore": 6.0,
      "lost": 2 * 6.0 + 2 * 6.0,
      "down": 150.0 + 2 * 0.5,
    }
  )
  assert str(goodput).startswith("goodput 10.8% of 4.7 min: start 10.6%, ")


def test_steps_after_the_checkpoint_are_lost(tmp_path, clock):
  run(tmp_path, clock, resumed=0, windows=4, killed=True)
  run(tmp_path, clock, resumed=35, windows=1, killed=True)
  # Half of the window from 30 to 40.
  assert read_goodput(tmp_path).seconds["lost"] == pytest.approx(3.0)


def test_parts_inside_of_others(tmp_path, clock):
  ledger = Ledger(tmp_path, clock.now)
  with ledger.during("evaluation"):
    clock.now += 1.0
    with pytest.raises(KeyError):
      failing(clock, ledger.during("compile"), 2.0)
    clock.now += 4.0
  with ledger.opened(0):
    pass
  seconds = read_goodput(tmp_path).seconds
  assert (seconds["evaluation"], seconds["compile"]) == (5.0, 2.0)
  assert seconds["start"] == seconds["steps"] == 0.0


def test_the_time_of_a_window(tmp_path, clock):
  ledger = Ledger(tmp_path, clock.now)
  clock.now += 9.0
  ledger.window()
  with ledger.during("steps"):
    for _ in range(2):
      spend(clock, ledger, "input", 2.0)
      clock.now += 5.0
    window = ledger.window()
    assert (window["steps"], window["input"]) == (10.0, 4.0)
    assert window["start"] == 0.0
    clock.now += 1.0
    assert ledger.window()["steps"] == 1.0


@pytest.mark.parametrize(
  "damage",
  [
    b"garbage\n",
    b"{}\n",
    b"[1]\n",
    b'{"kind": "time"}\n',
    b'{"kind": ["time"]}\n',
    b'{"kind": "save", "step": 1, "blocked": NaN, "durable": 1, "bytes": 1}\n',
    b'{"kind": "save", "step": true, "blocked": 1, "durable": 1, "bytes": 1}\n',
    bytes(40) + b"\n",
    b"[" * 100_000 + b"\n",
    b'{"kind": "time", "started": 100000',  # A process was killed here.
  ],
)
def test_a_damaged_line_loses_nothing(tmp_path, clock, damage):
  run(tmp_path, clock, resumed=0, windows=2, killed=True)
  path = tmp_path / "goodput.jsonl"
  with path.open("ab") as file:
    file.write(damage)
  Ledger(tmp_path, clock.now).write_save(Save(10, 1.5, 2.5, 30))
  run(tmp_path, clock, resumed=20, windows=2, killed=False)
  goodput = read_goodput(tmp_path)
  assert goodput.damaged == 1
  assert goodput.starts == 2
  assert goodput.saves == [Save(10, 1.5, 2.5, 30)]
  assert goodput.seconds["steps"] == pytest.approx(24.5)
  # A window in the middle is damaged: later records repeat its seconds.
  lines = path.read_bytes().splitlines()
  lines[1] = b"garbage"
  path.write_bytes(b"\n".join(lines))
  assert read_goodput(tmp_path).seconds == goodput.seconds


def test_a_run_without_a_ledger(tmp_path):
  assert read_goodput(tmp_path) is None
  (tmp_path / "goodput.jsonl").write_text("garbage\n")
  assert read_goodput(tmp_path) is None


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_ledger_that_is_not_a_file_is_refused(tmp_path, make):
  make(path := tmp_path / "goodput.jsonl")
  with pytest.raises(TrainingError, match=f"{path} is not a file: move it"):
    Ledger(tmp_path, 0.0)


def test_an_error_is_not_hidden_by_a_full_disk(tmp_path, monkeypatch):
  ledger = Ledger(tmp_path, 0.0)

  def full(**_):
    raise OSError(28, "No space left on device")

  with contextlib.ExitStack() as stack:
    stack.enter_context(pytest.raises(KeyError))
    stack.enter_context(ledger.opened(0))
    monkeypatch.setattr(ledger, "_append", full)
    raise KeyError
  with pytest.raises(OSError, match="No space"):
    ledger.write()


def test_the_clock_of_the_system_may_be_set_back(tmp_path, clock):
  run(tmp_path, clock, resumed=0, windows=1, killed=False)
  clock.now -= 500.0
  run(tmp_path, clock, resumed=10, windows=1, killed=False)
  assert read_goodput(tmp_path).seconds["down"] == 0.0


def test_durations():
  assert list(map(duration, (0.0093, 41.234, 60.0, 3599.0, 7200.0))) == [
    *("9.3 ms", "41.2 s", "1.0 min", "60.0 min", "2.0 h")
  ]


def test_the_cost_of_saves(tmp_path, clock):
  saves = SaveClock()
  (tmp_path / "inner").mkdir()
  (tmp_path / "file").write_bytes(bytes(30))
  (tmp_path / "inner" / "file").write_bytes(bytes(12))
  saves.start()
  clock.now += 2.0
  saves.returned(7)
  assert saves.take() is None  # It is being written.
  # The next save waits for it.
  saves.start()
  clock.now += 3.0
  saves.written(tmp_path)
  clock.now += 1.0
  saves.returned(9)
  clock.now += 10.0
  saves.written(tmp_path)
  assert saves.take() == Save(7, 2.0, 5.0, 42)
  assert saves.take() == Save(9, 4.0, 14.0, 42)
  assert saves.take() is None


def test_the_file_is_strict_json(tmp_path, clock):
  run(tmp_path, clock, resumed=0, windows=1, killed=False)
  for line in (tmp_path / "goodput.jsonl").read_text().splitlines():
    assert json.loads(line)["kind"] == "time"
