"""The curves of a run as HTML.

The lines are an SVG that stretches to the width of the screen. The labels are
text around it, because stretched letters would not be legible on a phone. The
style sheet gives the colours, so that they follow the reader's dark mode.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spatial_mamba_jax.report.markup import escape
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

# Classes of the style sheet, by kind of record.
_CLASSES = {"train": "train", "evaluation": "ema", "evaluation_raw": "raw"}
# Number of dashes in the style sheet.
_DASHES = 4
# Side of an SVG, in its own units.
_SIDE = 1000
# Most intervals between the ticks of a vertical axis.
_INTERVALS = 4
# A curve of more points is drawn by the extremes of as many groups of them.
_GROUPS = 400
# Most letters of a vertical axis's labels.
_LETTERS = 12


class _Scale(NamedTuple):
  """Maps steps and values to a chart's units, from 0 to `_SIDE`.

  Attributes:
    end: the last step; the first is 0.
    low: the lowest value.
    high: the highest value.
  """

  end: int
  low: float
  high: float

  def across(self, step: float | int) -> float:
    """Returns the distance from the left."""
    return _SIDE * step / self.end

  def up(self, value: float) -> float:
    """Returns the distance from the bottom."""
    return _SIDE * (value - self.low) / (self.high - self.low)


def charts(run: RunLog) -> str:
  """Returns a chart of every panel that has points."""
  axis = axis_of(run)
  prepared = []
  for panel, curves in panels_of(run):
    scale = _Scale(axis.end, *_value_range(panel, curves))
    prepared.append((panel, curves, scale, _value_ticks(scale)))
  # The same in all charts, so that their axes align.
  letters = max((len(text) for x in prepared for _, text in x[3]), default=1)
  drawn = "\n".join(
    _chart(panel, curves, axis.unit, _plot(run, curves, axis, scale, ticks))
    for panel, curves, scale, ticks in prepared
  )
  letters = min(letters, _LETTERS)
  return f'<div class=charts style="--letters: {letters}ch">\n{drawn}\n</div>'


def _chart(panel: Panel, curves: Sequence[Curve], unit: str, plot: str) -> str:
  name = f" <span class=unit>{escape(panel.unit)}</span>" if panel.unit else ""
  title = escape(panel.title)
  return f"""<section class=chart>
<header><h3>{title}{name}</h3>{_legend(curves)}</header>
<div class=plot role=img aria-label="{title} by {unit}">
{plot}
</div>
<p class=axis>{unit}</p>
</section>"""


def _plot(
  run: RunLog,
  curves: Sequence[Curve],
  axis: Axis,
  scale: _Scale,
  value_ticks: Sequence[tuple[float, str]],
) -> str:
  """Returns the lines of a chart, and the labels around them."""
  heights = [scale.up(value) for value, _ in value_ticks]
  grid = "".join(f"M0 {_SIDE - height:.5g}H{_SIDE}" for height in heights)
  shapes = [f'<path class=grid d="{grid}"/>']
  labels = [
    f'<span class=y style="bottom: {_percent(height)}">{text}</span>'
    for height, (_, text) in zip(heights, value_ticks, strict=True)
  ] + [
    f'<span class=x style="left: {_percent(scale.across(step))}">{text}</span>'
    for step, text in axis.ticks
  ]
  if run.best:
    left = scale.across(run.best["step"])
    shapes.append(f'<path class=best d="M{left:.5g} 0V{_SIDE}"/>')
    # The word stays within the plot at either end.
    place = f"clamp(1rem, {_percent(left)}, 100% - 1rem)"
    labels.append(f'<span class=best style="left: {place}">best</span>')
  for curve in curves:
    points = [
      (scale.across(step), _SIDE - scale.up(value))
      for step, value in zip(curve.steps, curve.values, strict=True)
    ]
    shapes += _shapes(curve, points)
  return f"""<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio=none>
{"".join(shapes)}
</svg>
{"".join(labels)}"""


def _percent(distance: float) -> str:
  return f"{100 * distance / _SIDE:.4g}%"


def _shapes(curve: Curve, points: Sequence[tuple[float, float]]) -> list[str]:
  """Returns the line of a curve and its dots."""
  path, is_drawn = [], False
  for x, y in _thinned(points):
    if math.isfinite(y):
      # A line of no length is a dot, for a point without neighbours.
      path.append(f"L{_pair(x, y)}" if is_drawn else f"M{_pair(x, y)}h0")
    is_drawn = math.isfinite(y)
  shapes = [f'<path class="{_look(curve)}" d="{"".join(path)}"/>']
  if len(points) <= MAX_DOTS:
    dots = "".join(f"M{_pair(x, y)}h0" for x, y in points if math.isfinite(y))
    shapes.append(f'<path class="{_look(curve)} dot" d="{dots}"/>')
  return shapes


def _pair(x: float, y: float) -> str:
  return f"{x:.5g} {y:.5g}"


def _look(curve: Curve) -> str:
  """Returns the classes of a curve, whose kind may be any text."""
  return f"{_CLASSES.get(curve.line.kind, 'train')} d{curve.dash % _DASHES}"


def _legend(curves: Sequence[Curve]) -> str:
  named = [curve for curve in curves if curve.line.name]
  if not named:
    return ""
  entries = "".join(
    '<li><svg viewBox="0 0 26 10"><path'
    f' class="{_look(curve)}" d="M1 5H25"/></svg>{escape(curve.line.name)}</li>'
    for curve in named
  )
  return f"<ul class=legend>{entries}</ul>"


def _thinned(
  points: Sequence[tuple[float, float]],
) -> Sequence[tuple[float, float]]:
  """Keeps the lowest and highest point of each group, and a gap in it."""
  if len(points) <= 3 * _GROUPS:
    return points
  heights = np.array([y for _, y in points])
  kept: list[int] = []
  for group in np.array_split(np.arange(len(points)), _GROUPS):
    is_drawn = np.isfinite(heights[group])
    kept += group[~is_drawn][:1].tolist()
    if len(drawn := group[is_drawn]):
      kept += [
        int(drawn[heights[drawn].argmin()]),
        int(drawn[heights[drawn].argmax()]),
      ]
  return [points[index] for index in sorted(set(kept))]


def _value_range(panel: Panel, curves: Sequence[Curve]) -> tuple[float, float]:
  """Returns the limits of a vertical axis, with a margin around the curves."""
  values = [x for curve in curves for x in curve.values if math.isfinite(x)]
  low, high = min(values, default=0.0), max(values, default=1.0)
  is_from_zero = panel in FROM_ZERO and low >= 0
  if is_from_zero:
    low = 0.0
  # A curve that does not change is in the middle.
  margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
  return low if is_from_zero else low - margin, high + margin


def _value_ticks(scale: _Scale) -> list[tuple[float, str]]:
  # Imported here, so that a missing matplotlib becomes one line of error.
  from matplotlib.ticker import MaxNLocator

  locator = MaxNLocator(_INTERVALS, steps=[1, 2, 2.5, 5, 10])
  values = [float(x) for x in locator.tick_values(scale.low, scale.high)]
  return [(x, _number(x)) for x in values if scale.low <= x <= scale.high]


def _number(value: float) -> str:
  """Writes a tick, in as few letters as are needed to tell it from others."""
  size = abs(value)
  if size == 0:
    return "0"
  text = f"{value:,.10g}" if size < 1e5 else f"{value:.4g}"
  return text.replace("e+", "e").replace("e-0", "e-").replace("-", "\u2212")
