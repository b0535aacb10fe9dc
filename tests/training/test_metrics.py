"""What is logged after a checkpoint is logged anew by the resumed run."""

import json
import struct
import time

from tensorboardX.proto.event_pb2 import Event, SessionLog

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.training.metrics import (
  MetricWriter,
  Stopwatch,
  slow_data_warning,
)


def read_events(path):
  """TensorBoard's records: length, checksum of it, bytes, checksum of them."""
  content, events = path.read_bytes(), []
  while content:
    (length,) = struct.unpack("<Q", content[:8])
    events.append(Event.FromString(content[12 : 12 + length]))
    content = content[16 + length :]
  return events


def test_a_resumed_run_drops_what_it_will_log_again(tmp_path):
  with MetricWriter(tmp_path, resumed_step=0) as writer:
    for step in (10, 20, 30):
      writer.write(step, "train", {"loss": 1.0})
  (first,) = (tmp_path / "tensorboard").iterdir()
  with MetricWriter(tmp_path, resumed_step=20) as writer:
    writer.write(30, "train", {"loss": 2.0})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  records = map(json.loads, lines)
  assert [(r["step"], r["loss"]) for r in records] == [
    (10, 1.0),
    (20, 1.0),
    (30, 2.0),
  ]
  assert [e.step for e in read_events(first) if e.summary.value] == [10, 20, 30]
  (second,) = set((tmp_path / "tensorboard").iterdir()) - {first}
  events = read_events(second)
  # TensorBoard forgets events of this and later steps.
  starts = [e.step for e in events if e.session_log.status == SessionLog.START]
  assert starts == [21]
  (event,) = (e for e in events if e.summary.value)
  (value,) = event.summary.value
  assert (event.step, value.tag, value.simple_value) == (30, "train/loss", 2.0)


def test_how_long_the_loop_waits(monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, "perf_counter", lambda: now)

  def batches():
    nonlocal now
    while True:
      now += 2.0  # Seconds that the loop waits.
      yield "batch"

  stopwatch = Stopwatch()
  iterator = batches()
  assert stopwatch.next(iterator) == "batch"
  now += 6.0
  with stopwatch.paused():
    now += 100.0
  assert stopwatch.read(80.0) == {"images_per_second": 10.0, "data_wait": 0.25}
  now += 3.0
  stopwatch.next(iterator)
  assert stopwatch.read(10.0) == {"images_per_second": 2.0, "data_wait": 0.4}


def test_slow_data_says_what_to_raise():
  warning = slow_data_warning(0.34, DataConfig(num_workers=3))
  assert "waits for data 34% of the time" in warning
  assert "raise config.data.num_workers (now 3;" in warning
