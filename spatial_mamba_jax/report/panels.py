"""What a report draws: panels, their curves, and the axis below them."""

import collections
from typing import NamedTuple

from spatial_mamba_jax.report.run_log import RunLog
from spatial_mamba_jax.tasks.base import Line, Panel

# Panels of every task: the loss above the task's own panels, the others below.
# A task that draws the loss with its unit replaces the panel of the loss.
_LOSS = Panel(
  "Loss",
  "",
  (
    Line("train", "loss", "training, with its regularisation"),
    Line("evaluation_raw", "loss", "validation, raw weights"),
    Line("evaluation", "loss", "validation, moving average"),
  ),
)
# Panels whose axis begins at 0.
FROM_ZERO = (
  Panel("Learning rate", "per step", (Line("train", "learning_rate", ""),)),
  Panel(
    "Gradient norm, before clipping",
    "L2",
    (Line("train", "grad_norm", ""),),
  ),
  Panel("Throughput", "images/s", (Line("train", "images_per_second", ""),)),
  Panel(
    "Model FLOPs, share of the devices' peak (MFU)",
    "%",
    (Line("train", "mfu", ""),),
    scale=100.0,
  ),
  Panel(
    "Waiting for data",
    "% of time",
    (Line("train", "data_wait", ""),),
    scale=100.0,
  ),
)
# Most points of a curve that are drawn as dots, too. A curve of few points, or
# of one, is hard to see without them.
MAX_DOTS = 40
# Most intervals between the ticks of the horizontal axis.
_INTERVALS = 6


class Curve(NamedTuple):
  """A line of a panel with its points.

  Attributes:
    line: the line.
    dash: which of the lines of its kind in the panel it is, from 0.
    steps: the steps of the points.
    values: their values in the panel's unit, NaN where they are not finite.
  """

  line: Line
  dash: int
  steps: list[int]
  values: list[float]


class Axis(NamedTuple):
  """The horizontal axis of all panels.

  Attributes:
    unit: "epoch" or "step".
    label: the unit, with its length.
    ticks: the step and the label of each tick.
    end: its last step; the first is 0.
  """

  unit: str
  label: str
  ticks: list[tuple[float, str]]
  end: int


def panels_of(run: RunLog) -> list[tuple[Panel, list[Curve]]]:
  """Returns the panels that have points, with their curves."""
  task_lines = [line[:2] for panel in run.task.panels for line in panel.lines]
  loss = [] if ("train", "loss") in task_lines else [_LOSS]
  panels = [
    (panel, _curves(panel, run))
    for panel in (*loss, *run.task.panels, *FROM_ZERO)
  ]
  return [(panel, curves) for panel, curves in panels if curves]


def axis_of(run: RunLog) -> Axis:
  """Returns an axis of whole epochs, or of steps before the second epoch."""
  # Imported here, so that a missing matplotlib becomes one line of error.
  from matplotlib.ticker import MaxNLocator

  end = max(run.last_step, 1)
  size, unit, label = 1.0, "step", "step"
  if (steps := run.epoch_steps) and end >= 2 * steps:
    size, unit, label = steps, "epoch", f"epoch of {steps:,.6g} steps"
  locator = MaxNLocator(_INTERVALS, integer=True, steps=[1, 2, 5, 10])
  counts = [x for x in locator.tick_values(0, end / size) if x * size <= end]
  return Axis(unit, label, [(x * size, _short(x)) for x in counts], end)


def _curves(panel: Panel, run: RunLog) -> list[Curve]:
  kinds = collections.Counter()
  curves = []
  for line in panel.lines:
    dash = kinds[line.kind]
    kinds[line.kind] += 1
    steps, values = run.points(line)
    if steps:
      scaled = [panel.scale * value for value in values]
      curves.append(Curve(line, dash, steps, scaled))
  return curves


def _short(count: float) -> str:
  """Writes a tick so shortly that six fit side by side on a phone."""
  if count >= 1e6:
    return f"{count / 1e6:g}M"
  return f"{count / 1e3:g}k" if count >= 1e4 else f"{count:,.0f}"
