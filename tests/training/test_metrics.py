"""Logs: a resumed run logs again what followed its checkpoint."""

import io
import json
import os
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from spatial_mamba_jax.data import DataConfig
from spatial_mamba_jax.training.config import TrainingError
from spatial_mamba_jax.training.metrics import (
  MetricWriter,
  Progress,
  slow_data_warning,
)


def read_events(path):
  """Yields TensorBoard's records: length, checksum, bytes, checksum."""
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


def test_slow_data_says_what_to_raise():
  warning = slow_data_warning(0.34, DataConfig(num_workers=3))
  assert "waits for data 34% of the time" in warning
  assert "raise config.data.num_workers (now 3;" in warning


RECORDS = [
  '{"step": 10, "kind": "train", "loss": 1.0}\n',
  '{"step": 20, "kind": "train", "loss": 0.5}\n',
  '{"step": 20, "kind": "evaluation", "loss": 0.7}\n',
]


@pytest.mark.parametrize(
  "damage",
  [
    b"garbage\n",
    b"{}\n",
    b"[1]\n",
    b"7\n",
    b'{"step": true, "kind": "train"}\n',
    b'{"step": "10", "kind": "train"}\n',
    b'{"step": 10}\n',
    b"\xff\xfe\x00\n",
    bytes(40) + b"\n",
    b"[" * 100_000 + b"\n",
    b"\n",
  ],
)
@pytest.mark.parametrize("place", range(4))
def test_a_damaged_line_is_kept_aside(tmp_path, capsys, damage, place):
  path = tmp_path / "metrics.jsonl"
  lines = [line.encode() for line in RECORDS]
  path.write_bytes(b"".join([*lines[:place], damage, *lines[place:]]))
  with MetricWriter(tmp_path, resumed_step=20) as writer:
    assert writer.last_step == 20
  assert path.read_text() == "".join(RECORDS)
  aside = tmp_path / "metrics.jsonl.damaged"
  assert aside.read_bytes() == damage
  assert capsys.readouterr().err == (
    f"{path}: 1 damaged lines were moved to {aside}\n"
  )


def test_an_evaluation_that_was_cut_off_is_logged_again(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(RECORDS) + '{"step": 20, "kind": "evalu')
  with MetricWriter(tmp_path, resumed_step=20, is_evaluated=False):
    assert path.read_text() == "".join(RECORDS[:2])
  (events,) = map(read_events, (tmp_path / "tensorboard").iterdir())
  # TensorBoard drops step 20 of other files, the window of training as well.
  starts = [e.step for e in events if e.session_log.status == SessionLog.START]
  assert starts == [20]
  scalars = [(e.step, v.tag) for e in events for v in e.summary.value]
  assert scalars == [(20, "train/loss")]


def strict(constant):
  raise ValueError(f"{constant} is not JSON")


def test_a_value_that_is_not_finite_is_null(tmp_path):
  path = tmp_path / "metrics.jsonl"
  # Earlier versions wrote NaN.
  path.write_text('{"step": 1, "kind": "train", "loss": NaN}\n')
  with MetricWriter(tmp_path, resumed_step=1) as writer:
    writer.write(2, "train", {"loss": float("nan"), "rate": float("-inf")})
  records = [
    json.loads(line, parse_constant=strict)
    for line in path.read_text().splitlines()
  ]
  assert records == [
    {"step": 1, "kind": "train", "loss": None},
    {"step": 2, "kind": "train", "loss": None, "rate": None},
  ]


def test_a_written_record_survives_a_kill(tmp_path):
  """Both files have it before the writer is closed."""
  with MetricWriter(tmp_path, resumed_step=0) as writer:
    writer.write(3, "train", {"loss": 0.25})
    assert '"step": 3' in (tmp_path / "metrics.jsonl").read_text()
    (path,) = (tmp_path / "tensorboard").iterdir()
    event = read_events(path)[-1]
    assert event.summary.value[0].simple_value == 0.25


def test_a_log_that_is_removed_begins_anew(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricWriter(tmp_path, resumed_step=0) as writer:
    writer.write(1, "train", {"loss": 1.0})
    path.unlink()
    writer.write(2, "train", {"loss": 0.5})
  (line,) = path.read_text().splitlines()
  assert json.loads(line) == {"step": 2, "kind": "train", "loss": 0.5}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_log_that_is_not_a_file_is_refused(tmp_path, make):
  make(path := tmp_path / "metrics.jsonl")
  with pytest.raises(TrainingError, match=f"{path} is not a file: move it"):
    MetricWriter(tmp_path, resumed_step=0)


def test_a_line_shows_the_speed(capsys):
  progress = Progress(step=0, steps=9, epoch_steps=3)
  speed = {"images_per_second": 812.3, "data_wait": 0.02}
  flops = "model_flops_per_second"
  progress.show(3, {"loss": 1.0, **speed, flops: 3.21e10})
  assert "  812 images/s  32.1 GFLOP/s  data wait 2%" in capsys.readouterr().err
  progress.show(3, {"loss": 1.0, **speed, flops: 8.1e13, "mfu": 0.411})
  line = "loss 1  812 images/s  81 TFLOP/s  MFU 41%  data wait 2%"
  assert line in capsys.readouterr().err


def closed(*_):
  raise OSError(5, "Input/output error")


@pytest.mark.parametrize("kind", ["file", "terminal", None])
def test_a_closed_standard_error_does_not_end_a_run(monkeypatch, capsys, kind):
  terminal = io.StringIO()
  terminal.isatty = lambda: kind == "terminal"
  monkeypatch.setattr(sys, "stderr", terminal if kind else None)
  progress = Progress(step=0, steps=9, epoch_steps=3)
  terminal.write = terminal.flush = closed
  progress.advance()
  progress.show(
    1,
    {
      "loss": 1.0,
      "accuracy": 0.5,
      "images_per_second": 1.0,
      "data_wait": 0.0,
    },
  )
  progress.say("a line")
  progress.close()
  assert capsys.readouterr().out == ""
