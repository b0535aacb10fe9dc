"""The benchmarks run, and count what they say."""

import json
import sys

import pytest

from benchmarks import model as benchmark
from spatial_mamba_jax.models.config import get_model_config


@pytest.mark.parametrize(
  ("size", "gmac"), [("tiny", 4.43), ("small", 7.07), ("base", 15.72)]
)
def test_work_is_the_papers(size, gmac):
  config = get_model_config(f"spatial_mamba_{size}")
  assert benchmark.forward_flops(config, 224) == pytest.approx(
    2e9 * gmac, rel=0.01
  )


def test_model_benchmark(monkeypatch, capsys):
  arguments = (
    "--model=spatial_mamba_micro --batch-size=2 --size=32 --repeats=2 --json"
  )
  monkeypatch.setattr(sys, "argv", ["model", *arguments.split()])
  benchmark.main()
  record = json.loads(capsys.readouterr().out)
  for program in ("inference", "train"):
    measured = record[program]
    assert measured["images_per_second"] > 0
    assert 0 < measured["matmul_share"] < 1
    assert measured["peak_bytes"] > 1e6
