"""Draws the time and the cost of a recipe against the number of chips."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spatial_mamba_jax.forecast.recipe import Forecast

if TYPE_CHECKING:
  import matplotlib.figure


def draw(forecasts: Sequence[Forecast]) -> "matplotlib.figure.Figure":
  """Draws two panels, with a line for each kind of accelerator.

  The cost is the price where one was given, and chip-hours otherwise. A cross
  marks what cannot run.
  """
  # Imported here, so that a missing matplotlib becomes one line of error.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 6), layout="constrained")
  is_priced = all(each.price is not None for each in forecasts)
  panels = (
    ("Days, at least", lambda each: each.days),
    (
      "Price, at least" if is_priced else "Chip-hours, at least",
      lambda each: each.price if is_priced else each.chip_hours,
    ),
  )
  by_name = {}
  for each in sorted(forecasts, key=lambda each: each.step.devices):
    by_name.setdefault(each.step.accelerator.name, []).append(each)
  for axes, (title, value) in zip(
    figure.subplots(len(panels), sharex=True), panels, strict=True
  ):
    for name, group in by_name.items():
      chips = [each.step.devices for each in group]
      (line,) = axes.loglog(chips, list(map(value, group)), "o-", label=name)
      failing = [each for each in group if each.problems]
      axes.loglog(
        [each.step.devices for each in failing],
        list(map(value, failing)),
        "x",
        color=line.get_color(),
        markersize=12,
      )
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
  figure.axes[-1].set_xlabel("chips")
  return figure
