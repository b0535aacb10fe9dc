"""Runs that are killed again and again, and runs that take many steps."""

import json
import os
import pathlib
import random
import signal
import statistics
import time

import numpy as np
import pytest

pytestmark = pytest.mark.soak

DIGITS = (
  "--config.data.name=digits",
  "--config.task.num_classes=10",
  "--config.batch_size=64",
  "--config.evaluation_batch_size=64",
)
KILLS = 10
# Steps between checkpoints.
INTERVAL = 5
# More than all kills can use up: after each, at most 2 * INTERVAL - 1 steps are
# repeated, and the next kill comes 1 to 3 * INTERVAL steps later.
STEPS = 160


def last_step(workdir):
  """Returns the last logged step; 0 where there is none."""
  log = workdir / "metrics.jsonl"
  text = log.read_text() if log.exists() else ""
  steps = [json.loads(x)["step"] for x in text.splitlines(keepends=True)[:-1]]
  return max(steps, default=0)


def newest(directory):
  """Returns the step of the newest complete checkpoint; 0 for none."""
  names = (x.parent.name for x in directory.rglob("digests.json"))
  return max((int(x) for x in names if x.isdecimal()), default=0)


def is_saving(directory):
  return any("tmp" in x.name for x in directory.rglob("*.orbax-checkpoint-*"))


def kill(process, condition):
  """Kills a process once the condition holds."""
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.001)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def test_ten_kills_change_no_bit(experiment, tmp_path):
  """Every other kill is in a save; later runs save to a local disk first."""
  arguments = (
    *DIGITS,
    f"--config.length={STEPS} steps",
    "--config.evaluate_every=80 steps",
    f"--config.checkpoint_every={INTERVAL} steps",
    "--config.log_every=1 step",
  )
  whole, runs = tmp_path / "whole", tmp_path / "runs"
  killed, local = runs / "killed", runs / "local"
  status, _, err = experiment.run("train.py", f"--workdir={whole}", *arguments)
  assert status == 0, err

  draw = random.Random(0)
  for number in range(KILLS):
    if number == KILLS // 2:
      arguments += (f"--config.local_checkpoint_dir={local}",)
    resumed = newest(runs)
    until = resumed + draw.randint(1, 3 * INTERVAL)
    process = experiment.start("train.py", f"--workdir={killed}", *arguments)
    kill(
      process,
      lambda until=until, saves=number % 2: (
        last_step(killed) >= until and (not saves or is_saving(runs))
      ),
    )
    # A save in the background takes less than an interval, or the loop waits.
    assert last_step(killed) - newest(runs) < 2 * INTERVAL
  assert newest(runs) < STEPS  # All kills were before the end.
  assert newest(local)
  status, _, err = experiment.run("train.py", f"--workdir={killed}", *arguments)
  assert status == 0, err

  assert not newest(local)  # Its files are removed after the last step.
  assert experiment.records(killed) == experiment.records(whole)
  found, expected = map(experiment.final_arrays, (killed, whole))
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_memory_stays_flat_over_a_thousand_steps(experiment, tmp_path):
  """With ten evaluations and checkpoints."""
  process = experiment.start(
    "train.py",
    f"--workdir={tmp_path}",
    *DIGITS,
    "--config.length=1000 steps",
    "--config.evaluate_every=100 steps",
    "--config.log_every=10 steps",
  )
  statm = pathlib.Path(f"/proc/{process.pid}/statm")
  found: list[tuple[int, int]] = []  # Step and resident bytes.
  while process.poll() is None:
    pages = statm.read_text().split()
    if len(pages) > 1:  # Empty once the process has ended.
      resident = int(pages[1]) * os.sysconf("SC_PAGE_SIZE")
      found.append((last_step(tmp_path), resident))
    time.sleep(0.2)
  assert process.wait() == 0, process.communicate()

  def median(first, last):
    return statistics.median(x for step, x in found if first <= step < last)

  early, late = median(200, 400), median(800, 1000)
  assert late < 1.03 * early, (early, late)
