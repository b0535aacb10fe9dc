"""Forms of the scan are compared fairly, and what fails is told."""

import json
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spatial_mamba_kernels as smk

from benchmarks import (
  formulations,
  formulations_report,
  scan_forms,
  scan_programs,
)
from benchmarks.scan_programs import CHANNELS, Case


@pytest.mark.parametrize("length", [1, 64, 100])
def test_chunked_form_equals_the_library(length, x64):
  keys = jax.random.split(jax.random.key(0), 6)
  normal = partial(jax.random.normal, dtype="float64")
  arrays = {
    "u": normal(keys[0], (2, length, 3)),
    "delta": normal(keys[1], (2, length, 3)),
    "A": -jnp.exp(normal(keys[2], (3, 2))),
    "B": normal(keys[3], (2, length, 2)),
    "delta_bias": normal(keys[4], (3,)),
  }
  g = normal(keys[5], (2, length, 3, 2))

  def values(form):
    h, pullback = jax.vjp(lambda arrays: form(**arrays), arrays)
    return h, pullback(g)[0]

  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12),
    *map(values, (scan_forms.chunked, smk.selective_scan)),
  )


def measured(cases):
  """Measures in this process; returns {kind: values}."""
  sent = {}
  scan_programs.measure(
    lambda message: sent.setdefault(message[0], []).append(message[1]),
    cases=cases,
  )
  return sent


def test_measurements_of_a_small_scan():
  cases = [
    Case(form, (1, 64, CHANNELS), "float32", gradients)
    for form in scan_programs.FORMS
    for gradients in (False, True)
  ]
  sent = measured(cases)
  assert len(sent["row"]) == len(sent["end"]) == len(cases)
  arrays = 4 * (2 * 64 * CHANNELS + CHANNELS + 64 + CHANNELS)
  states = 4 * 64 * CHANNELS
  for case, row in zip(cases, sent["row"], strict=True):
    assert row["form"] == case.form
    assert row["seconds"] > 0
    # 64 steps, each rounded; in the gradients sums over 64 tokens.
    assert row["error"] < 64 * 2**-23
    assert row["compulsory_bytes"] == (
      2 * (arrays + states) if case.gradients else arrays + states
    )
    assert row["moved_bytes"] > 0.9 * row["compulsory_bytes"]
  launches = {row["form"]: row["launches"] for row in sent["row"][::2]}
  assert launches["sequential"] >= 64 > launches["associative"]
  assert launches["chunked"] < launches["sequential"]


def test_an_error_is_relative_to_the_greatest_value():
  case = Case("sequential", (1, 8, CHANNELS), "float32", False)
  exact = scan_programs._exact(case.shape, case.dtype, case.gradients)
  wrong = exact.copy()
  wrong[0, 3, 1] += 0.25 * np.abs(exact).max()
  assert scan_programs._error(wrong, case) == pytest.approx(0.25)
  wrong[0, 4, 2] = math.nan
  assert math.isnan(scan_programs._error(wrong, case))


def test_a_slow_form_is_not_run_for_more_tokens(monkeypatch):
  monkeypatch.setattr(scan_programs, "LONGEST_SECONDS", 0.0)
  cases = [
    Case(form, (1, length, CHANNELS), "float32", False)
    for length in (2, 4)
    for form in ("sequential", "associative")
  ]
  sent = measured(cases)
  assert [row["shape"][1] for row in sent["row"]] == [2, 2]
  assert [case["shape"][1] for case in sent["left_out"]] == [4, 4]


def test_a_form_that_compiles_slowly_is_not_compiled_for_more(monkeypatch):
  monkeypatch.setattr(scan_programs, "LONGEST_COMPILATION", 0.0)
  cases = [
    Case("sequential", shape, "float32", False)
    for shape in ((1, 2, 4), (1, 2, CHANNELS), (1, 4, CHANNELS))
  ]
  sent = measured(cases)
  assert [tuple(row["shape"]) for row in sent["row"]] == [
    (1, 2, 4),
    (1, 2, CHANNELS),
  ]
  assert [case["shape"][1] for case in sent["left_out"]] == [4]


def test_command(monkeypatch, capsys, tmp_path):
  """One program crashes its process; the others are measured."""
  chosen = [
    Case("sequential", (1, 16, CHANNELS), "float32", False),
    Case("no such form", (1, 16, CHANNELS), "float32", False),
    Case("sequential", (1, 16, CHANNELS), "bfloat16", True),
  ]
  monkeypatch.setattr(formulations, "cases", lambda *_: iter(chosen))
  monkeypatch.setattr(formulations, "is_installed", lambda _: False)
  file = tmp_path / "scans.json"
  monkeypatch.setattr(sys, "argv", ["formulations", f"--output={file}"])
  with pytest.raises(SystemExit, match="no such form"):
    formulations.main()
  record = json.loads(file.read_text())
  assert [row["dtype"] for row in record["rows"]] == ["float32", "bfloat16"]
  assert record["device"] == "cpu"
  out = capsys.readouterr().out
  assert "| sequential forward, 1, 16, 32, float32 |" in out
  assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
  assert "<svg" in file.with_suffix(".svg").read_text()


@pytest.mark.parametrize("target", ["v5e:2x2x2x2", "toaster"])
def test_an_unknown_target_is_one_line(monkeypatch, capfd, tmp_path, target):
  output = f"--output={tmp_path / 'scans.json'}"
  monkeypatch.setattr(sys, "argv", ["formulations", "--target", target, output])
  with pytest.raises(SystemExit, match="--target: nothing here compiles for"):
    formulations.main()
  assert "Traceback" not in capfd.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "arguments",
  [("--lengths", "0"), ("--batch-size", "x"), ("--output", "no/such/x.json")],
)
def test_a_wrong_argument_is_refused(monkeypatch, capsys, arguments):
  monkeypatch.setattr(sys, "argv", ["formulations", *arguments])
  with pytest.raises(SystemExit):
    formulations.main()
  assert "error: argument" in capsys.readouterr().err


def test_tables_mark_the_fastest_and_fit_the_growth():
  rows = [
    {
      **{"form": form, "shape": [1, length, CHANNELS], "dtype": "float32"},
      **{"gradients": gradients, "seconds": factor * length**power},
      **{"spread": 0.0, "error": 0.0, "temporary_bytes": 1, "moved_bytes": 3},
      **{"compulsory_bytes": 2, "launches": 1, "kernels": 0},
      "compile_seconds": 0.1,
    }
    for length in (1024, 4096, 16384, 65536)
    for gradients in (False, True)
    for form, factor, power in (("sequential", 1e-7, 1), ("chunked", 1e-8, 1.5))
  ]
  machine = {"device": "cpu", "cores": 2, "versions": {}, "commit": "0" * 40}
  record = {
    **machine,
    **{"date": "today", "command": "", "rows": rows, "left_out": []},
  }
  text = "\n".join(formulations_report.tables(record))
  assert "| sequential, float32 | L^1.00, 100 ns a token | L^1.00," in text
  assert "| chunked, float32 | L^1.50," in text
  # 1e-8 * sqrt(1024) > 1e-7, so that the loop is the faster one.
  assert "| 1, 1,024, 32, float32 | **0.102** / **0.102** | 0.328 / " in text
  assert " | 1.50 | 1 | 0 | 0.1 |" in text
