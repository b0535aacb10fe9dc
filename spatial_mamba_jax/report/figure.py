"""Draws the curves of a run as a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spatial_mamba_jax.report.panels import (
  FROM_ZERO,
  MAX_DOTS,
  Axis,
  Curve,
  axis_of,
  panels_of,
)
from spatial_mamba_jax.report.run_log import RunLog
from spatial_mamba_jax.tasks.base import Panel

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


def draw(run: RunLog) -> "matplotlib.figure.Figure":
  """Draws every panel that has records, one above the other."""
  # Imported here, so that a missing matplotlib becomes one line of error.
  from matplotlib.figure import Figure

  panels = panels_of(run)
  # One column is legible on a phone; six panels fill a printed page.
  figure = Figure(
    figsize=(7, 0.9 + 1.6 * len(panels)), dpi=200, layout="constrained"
  )
  figure.suptitle(run.name, fontsize=12, fontweight="bold", parse_math=False)
  if not panels:
    return figure
  axis = axis_of(run)
  grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
  for axes, (panel, curves) in zip(grid, panels, strict=True):
    _draw_panel(axes, panel, curves)
    if run.best:
      _mark(axes, run.best["step"])
  _draw_axis(grid[-1], axis, run.best is not None)
  figure.align_ylabels(grid)
  return figure


def _draw_axis(axes: Any, axis: Axis, is_marked: bool) -> None:
  positions, labels = zip(*axis.ticks, strict=True)
  axes.set_xticks(positions, labels)
  label = f"{axis.label} (dotted: best checkpoint)" if is_marked else axis.label
  axes.set_xlabel(label, fontsize=9)
  # A margin on the right, so that the last dot is whole.
  axes.set_xlim(0, 1.01 * axis.end)


def _mark(axes: Any, step: int) -> None:
  axes.vlines(
    step,
    0,
    1,
    transform=axes.get_xaxis_transform(),
    color="0.35",
    linewidth=0.8,
    linestyle=(0, (2, 2)),
    zorder=1,
  )


def _draw_panel(axes: Any, panel: Panel, curves: Sequence[Curve]) -> None:
  for curve in curves:
    axes.plot(
      curve.steps,
      curve.values,
      color=_COLOURS.get(curve.line.kind, _COLOURS["train"]),
      label=curve.line.name,
      linestyle=_DASHES[curve.dash % len(_DASHES)],
      linewidth=1.3,
      marker="o" if len(curve.steps) <= MAX_DOTS else None,
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
  if panel in FROM_ZERO:
    # Scaling from 0 leaves a margin above a line that hardly changes.
    axes.update_datalim([(0, 0)], updatex=False)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(bottom=0)
  if len(panel.lines) > 1:
    columns = 1 + (len(panel.lines) > 3)
    axes.legend(fontsize=8, frameon=False, handlelength=2.6, ncols=columns)
