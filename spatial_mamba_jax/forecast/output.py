"""A forecast as text, as a table of several, and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from spatial_mamba_jax.forecast.recipe import IMAGES_PER_CORE, Forecast

_LINKS = {True: "TPU links", False: "NVLink"}


def text(forecast: Forecast) -> str:
  """Returns the whole forecast, with its assumptions."""
  step = forecast.step
  mesh = ", ".join(f"{axis} {size}" for axis, size in step.mesh.items())
  head = (
    f"{step.target}: chips {step.devices:,}, hosts {step.hosts:,}; mesh:"
    f" {mesh}; images a step {step.batch_size:,}, of a chip"
    f" {step.batch_size / step.devices:g}"
  )
  parts = [
    [head],
    _memory(forecast),
    _time(forecast),
    _collectives(forecast),
    _recipe(forecast),
    ["assumptions", *(f"  - {line}" for line in assumptions(forecast))],
  ]
  if forecast.problems:
    parts.append([f"this cannot run: {x}" for x in forecast.problems])
  return "\n\n".join("\n".join(part) for part in parts)


def _memory(forecast):
  memory = forecast.step.memory
  rows = [
    (name, size / 1e9) for name, size in dataclasses.asdict(memory).items()
  ]
  rows = [f"  {name:<14}{size:10.3f}" for name, size in rows]
  total = f"  {'in all':<14}{memory.total / 1e9:10.3f}"
  usable = f" of {forecast.usable_memory / 1e9:.1f} that it has"
  return ["memory of a chip, GB", *rows, total + usable]


def _time(forecast):
  accelerator, work = forecast.step.accelerator, forecast.step.after
  network = accelerator.network_rate / accelerator.host_devices
  has_mesa = forecast.step.times.mesa_from is not None
  heads = ("before MESA", "with MESA") if has_mesa else ("all steps",)
  title = "a step of a chip, with MESA" if has_mesa else "a step of a chip"
  lines = [f"{title:<49}ms:" + "".join(f"{head:>12}" for head in heads)]
  for name, amount, rate, unit, what in (
    ("compute", work.flops, accelerator.flops, "FLOP", "bfloat16 peak"),
    ("memory", work.memory, accelerator.memory_rate, "B", "device memory"),
    ("link", work.link, accelerator.link_rate, "B", _links(forecast)),
    ("network", work.network, network, "B", "between hosts or slices"),
  ):
    times = _columns(
      [getattr(time, name) for time in (forecast.before, forecast.after)],
      has_mesa,
    )
    lines.append(
      f"  {name:<10}{amount / 1e9:10,.3f} G{unit:<4} at {rate / 1e9:9,.1f}"
      f" {f'G{unit}/s':<8}{times}   {what}"
    )
  totals = [forecast.before.total, forecast.after.total]
  lines.append(
    f"  {'step':<10}{'':38}{_columns(totals, has_mesa)}   at least, bound by"
    f" {forecast.after.bound}"
  )
  return lines


def _columns(seconds, has_mesa):
  """Milliseconds before MESA and with it; without MESA they are the same."""
  shown = seconds if has_mesa else seconds[:1]
  return "".join(f"{1e3 * x:12.3f}" for x in shown)


def _links(forecast):
  is_tpu = forecast.step.accelerator.kinds[0].startswith("TPU")
  return _LINKS[is_tpu]


def _collectives(forecast):
  step = forecast.step
  lines = [
    f"  {kind:<20}{count:6} runs{sent / 1e6:12,.2f} MB sent"
    for kind, (count, sent) in step.collectives.items()
  ]
  overlap = (
    f"  {step.asynchronous} of the program's {step.scheduled} collectives are"
    " asynchronous: other work may overlap them"
  )
  if not lines:
    return ["collectives of a step: none"]
  return ["collectives of a step, of a chip", *lines, overlap]


def _recipe(forecast):
  step = forecast.step
  price = "" if forecast.price is None else f", price {forecast.price:,.2f}"
  return [
    f"whole recipe: {step.times.steps:,} steps",
    f"  at most {forecast.images_per_second:,.0f} images/s,"
    f" MFU {forecast.mfu:.1%}"
    f" ({step.image_flops / 1e9:.2f} GFLOP an image)",
    f"  at least {forecast.days:.3f} days ({24 * forecast.days:.1f} hours),"
    f" {forecast.chip_hours:,.1f} chip-hours{price}",
    f"  input: at most {forecast.input_cores:.1f} cores a host, of"
    f" {step.accelerator.cores}",
  ]


def assumptions(forecast: Forecast) -> list[str]:
  """Returns what the figures rest on."""
  step = forecast.step
  source = "given"
  if forecast.images_per_core == IMAGES_PER_CORE:
    source = (
      "measured with python -m benchmarks.input: the complete ImageNet recipe,"
      " photographs of 500 x 375 pixels, one core of a busy 2-core server"
    )
  usable = "what the data sheet says"
  if not step.accelerator.kinds[0].startswith("TPU"):
    usable = "the share that JAX takes: 75%, or XLA_PYTHON_CLIENT_MEM_FRACTION"
  return [
    "rates are peaks of the vendors' data sheets"
    " (spatial_mamba_jax/hardware.py); no program reaches them, so times are"
    " lower bounds",
    "compute and memory traffic overlap completely; collectives overlap with"
    " nothing, and take no time to start",
    "FLOP are those of products, convolutions and recurrences in the traced"
    " step, at the bfloat16 rate; elementwise work takes no time but its"
    " memory traffic",
    "memory traffic is counted in the compiled program: each launched"
    " instruction reads its operands and writes its results once",
    "a collective sends as little as any algorithm can, over all links of a"
    " chip at once; among hosts or slices it is made inside of each first",
    "MFU counts three times the forward pass, and no teacher",
    f"a chip's memory is {usable}",
    f"a core prepares {forecast.images_per_core:g} images/s ({source}); a host"
    f" has {step.accelerator.cores} virtual cores",
    "for GPUs, XLA's choice of kernels for products is not tuned on a device",
    "evaluations, checkpoints, compilation, restarts and waiting for data are"
    " left out",
  ]


def to_json(forecast: Forecast) -> dict[str, Any]:
  """Returns the forecast as JSON types: bytes, seconds and FLOP."""
  step = forecast.step
  plain = {
    field.name: getattr(step, field.name)
    for field in dataclasses.fields(step)
    if field.name not in ("accelerator", "program", "compiled")
  }
  plain |= {
    name: dataclasses.asdict(plain[name])
    for name in ("times", "memory", "before", "after")
  }
  return {
    **plain,
    "accelerator": step.accelerator.name,
    "usable_memory": forecast.usable_memory,
    "step_seconds": {
      "before": _seconds(forecast.before),
      "after": _seconds(forecast.after),
    },
    "images_per_second": forecast.images_per_second,
    "mfu": forecast.mfu,
    "days": forecast.days,
    "chip_hours": forecast.chip_hours,
    "price": forecast.price,
    "images_per_core": forecast.images_per_core,
    "input_cores": forecast.input_cores,
    "problems": forecast.problems,
    "assumptions": assumptions(forecast),
  }


def _seconds(time):
  return {**dataclasses.asdict(time), "total": time.total}


def table(forecasts: Sequence[Forecast]) -> str:
  """Returns a Markdown table, a line a machine, with the fewest chips first."""
  lines = [
    "| topology | chips | fsdp | GB a chip | ms a step, at least | bound by"
    " | images/s, at most | MFU | days | chip-hours | price"
    " | input cores a host | can run |",
    "| --- " * 13 + "|",
  ]
  for each in sorted(forecasts, key=lambda x: x.step.devices):
    step = each.step
    price = "" if each.price is None else f"{each.price:,.0f}"
    mean = each.seconds / step.times.steps
    lines.append(
      f"| {step.target} | {step.devices:,} | {step.mesh['fsdp']}"
      f" | {step.memory.total / 1e9:.1f} of {each.usable_memory / 1e9:.1f}"
      f" | {1e3 * mean:.2f} | {each.after.bound}"
      f" | {each.images_per_second:,.0f} | {each.mfu:.0%} | {each.days:.2f}"
      f" | {each.chip_hours:,.0f} | {price}"
      f" | {each.input_cores:.1f} of {step.accelerator.cores}"
      f" | {'no' if each.problems else 'yes'} |"
    )
  return "\n".join(lines)
