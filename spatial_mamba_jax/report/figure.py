"""Draws the curves of a run."""

import collections
from typing import TYPE_CHECKING, Any

from spatial_mamba_jax.report.run_log import RunLog
from spatial_mamba_jax.tasks.base import Line, Panel

if TYPE_CHECKING:
  import matplotlib.figure

# Colours by kind of record, from the palette of Okabe and Ito, which people
# with colour blindness can tell apart.
_COLOURS = {
  "train": "#0072B2",
  "evaluation": "#D55E00",
  "evaluation_raw": "#009E73",
}
# Dashes of the lines of one kind in a panel, in order.
_DASHES = ("-", "--", ":", "-.")
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
_FROM_ZERO = (
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


def draw(run: RunLog) -> "matplotlib.figure.Figure":
  """Draws every panel that has records, one above the other."""
  # Imported here, so that a missing matplotlib becomes one line of error.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  task_lines = [line[:2] for panel in run.task.panels for line in panel.lines]
  loss = [] if ("train", "loss") in task_lines else [_LOSS]
  panels = [
    panel
    for panel in (*loss, *run.task.panels, *_FROM_ZERO)
    if any(run.points(line)[0] for line in panel.lines)
  ]
  # One column is legible on a phone; six panels fill a printed page.
  figure = Figure(
    figsize=(7, 0.9 + 1.6 * len(panels)), dpi=200, layout="constrained"
  )
  figure.suptitle(run.name, fontsize=12, fontweight="bold", parse_math=False)
  if not panels:
    return figure
  grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
  for axes, panel in zip(grid, panels, strict=True):
    _draw_panel(axes, panel, run)
  grid[-1].set_xlabel("step", fontsize=9)
  grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
  grid[-1].set_xlim(left=0)
  figure.align_ylabels(grid)
  if steps := run.epoch_steps:
    epochs = grid[-1].secondary_xaxis(
      -0.42, functions=(lambda x: x / steps, lambda x: x * steps)
    )
    epochs.set_xlabel("epoch", fontsize=9)
    epochs.tick_params(labelsize=8, length=3, color="0.6")
    epochs.spines["bottom"].set_color("0.6")
  return figure


def _draw_panel(axes: Any, panel: Panel, run: RunLog) -> None:
  kinds = collections.Counter()
  for line in panel.lines:
    dash = _DASHES[kinds[line.kind] % len(_DASHES)]
    kinds[line.kind] += 1
    steps, values = run.points(line)
    if not steps:
      continue
    axes.plot(
      steps,
      [panel.scale * value for value in values],
      color=_COLOURS.get(line.kind, _COLOURS["train"]),
      label=line.name,
      linestyle=dash,
      linewidth=1.3,
      # A line of few points, or of one, is hard to see without markers.
      marker="o" if len(steps) <= 40 else None,
      markersize=3,
    )
  axes.set_title(panel.title, loc="left", fontsize=10)
  axes.set_ylabel(panel.unit, fontsize=9)
  axes.tick_params(labelsize=8, length=3, color="0.6")
  axes.grid(color="0.9", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  for side in ("left", "bottom"):
    axes.spines[side].set_color("0.6")
  if panel in _FROM_ZERO:
    # Scaling from 0 leaves a margin above a line that hardly changes.
    axes.update_datalim([(0, 0)], updatex=False)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(bottom=0)
  if len(panel.lines) > 1:
    columns = 1 + (len(panel.lines) > 3)
    axes.legend(fontsize=8, frameon=False, handlelength=2.6, ncols=columns)
