"""Forecasts beside measurements of the same step on one device."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from spatial_mamba_jax.forecast.recipe import Forecast
from spatial_mamba_jax.training.config import ModelSection

# Where `python -m benchmarks.device` writes, in a checkout.
RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results"


def ratios(forecast: Forecast, results: pathlib.Path = RESULTS) -> list[str]:
  """Returns a line for each measurement of the forecast's step.

  Measured is the same network with the same image size and images a chip, on
  one device of the kind, without MESA and without collectives.

  Args:
    forecast: the forecast.
    results: a directory of JSON files.
  """
  time = forecast.before
  seconds = max(time.compute, time.memory)
  images = forecast.step.batch_size / forecast.step.devices
  return [
    f"measured on one {device}: {speed:,.0f} images/s in training; the roofline"
    f" says {images / seconds:,.0f}, {images / seconds / speed:.2f} times as"
    " many"
    for device, speed in _measurements(forecast, images, results)
  ]


def _measurements(
  forecast: Forecast, images: float, results: pathlib.Path
) -> Iterator[tuple[str, float]]:
  config = forecast.step.program.config
  wanted: dict[str, Any] = {
    "program": "train",
    "model": config.model.name,
    "size": config.data.image_size,
    "batch_size": images,
    "implementation": "default",
  }
  # Without stochastic depth, which changes no time.
  model = dataclasses.replace(config.model, drop_path_rate=0.0)
  for path in sorted(results.glob("*.json")):
    found = json.loads(path.read_text())
    if found.get("device") not in forecast.step.accelerator.kinds:
      continue
    if model != ModelSection(name=model.name, dtype=found["dtype"]):
      continue
    for network in found.get("networks", ()):
      if {name: network.get(name) for name in wanted} == wanted:
        yield found["device"], network["images_per_second"]
