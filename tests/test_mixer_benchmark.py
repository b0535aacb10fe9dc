"""Mixers are compared side by side, and what they move is counted."""

import json
import sys

import pytest

from benchmarks import machine, mixer_programs, mixers, mixers_report
from spatial_mamba_jax.models.mixers import MIXERS


@pytest.mark.parametrize(
  ("name", "transposed", "reversed_"),
  # Of the paths: back and forth along columns, and from the end of each path.
  [
    ("spatial_mamba", 0, 0),
    ("mamba", 0, 0),
    ("vim", 0, 2),
    ("ss2d", 2, 4),
    ("evss", 1, 1),
  ],
)
def test_no_mixer_moves_images_more_often_than_its_paths(
  name, transposed, reversed_
):
  moves = mixer_programs.moves(MIXERS[name])
  # What the tokens select is moved too, and is thin.
  assert transposed <= moves["transposed"] < transposed + 0.25
  assert reversed_ <= moves["reversed"] < reversed_ + 0.5
  assert moves["gathered"] == 0


def speed(size, program, images):
  return {
    "size": size,
    "program": program,
    "compile_seconds": 3.0,
    "images_per_second": images,
    "spread": 0.01,
    "matmul_share": 0.25,
    "peak_bytes": 5e6,
  }


def test_tables_and_pictures_of_a_record():
  programs = [("inference", 20.0), ("train", 4.0)]
  record = {
    "command": "the command",
    "speed_machine": {"device": "a device"},
    "cost": {
      "mamba": [
        {
          "parameters": 1234,
          "flops_of_224": 5e6,
          "moves": {"transposed": 1.0, "gathered": 0.0, "reversed": 2.0},
        }
      ]
    },
    "accuracy": {
      "mamba": [{"seed": seed, "top1": 0.96 + seed / 100} for seed in range(3)]
    },
    "speed": {"mamba": [speed(32, *x) for x in programs]},
    "bytes": {
      "mamba": [{"target": "H200", "size": 32, "bytes": 7e6, "launches": 1234}]
    },
  }
  text = "\n".join(mixers_report.tables(record))
  assert (
    "| mamba | 1,234 | 5.0 | 1.0 | 0.0 | 2.0 | 96.00%, 97.00%, 98.00% | 97.00%"
    " | 2.00% |"
  ) in text
  assert "| mamba | 20 (0.25; 5; 3) |" in text
  assert "| mamba | 4 (0.25; 5; 3) |" in text
  assert "| mamba | 7 (1,234) |" in text
  pictures = mixers_report.pictures(record)
  assert pictures[".png"].startswith(b"\x89PNG")
  assert b"mamba" in pictures[".svg"]
  del record["speed"], record["accuracy"]
  assert not mixers_report.pictures(record)
  assert "| - | - | - |" in "\n".join(mixers_report.tables(record))


def test_rows_of_another_commit_are_dropped(monkeypatch):
  now = {"commit": "a", "date": "today", "device": "cpu"}
  monkeypatch.setattr(machine, "describe", lambda: now)
  rows = {"mamba": [{"seed": 0}]}
  record = {"speed": rows, "speed_machine": {**now, "date": "yesterday"}}
  mixers.start(record, "speed")
  assert record == {"speed": rows, "speed_machine": now}
  record["speed_machine"] = {**now, "commit": "b"}
  mixers.start(record, "speed")
  assert record == {"speed": {}, "speed_machine": now}


@pytest.mark.soak
def test_the_command_measures_and_keeps_what_it_has(
  tmp_path, monkeypatch, capsys
):
  file = tmp_path / "mixers.json"

  def run(*arguments):
    command = ["benchmark", f"--output={file}", "--mixers", "mamba"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    mixers.main()
    return json.loads(file.read_text())

  run("--sections", "cost")
  record = run("--sections", "speed", "--sizes", "32", "--batch-size=1")
  assert record["cost"]["mamba"][0]["parameters"] > 10**5
  programs = [row["program"] for row in record["speed"]["mamba"]]
  assert programs == ["inference", "train"]
  assert all(row["images_per_second"] > 0 for row in record["speed"]["mamba"])
  assert "| mamba |" in capsys.readouterr().out
  assert file.with_suffix(".svg").exists()
