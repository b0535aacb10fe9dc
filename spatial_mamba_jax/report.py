"""Draws what a run has logged, as a picture and a page.

  python -m spatial_mamba_jax.report WORKDIR

writes `WORKDIR/report.png` and `WORKDIR/report.html`, which needs nothing but
itself, from `metrics.jsonl` and `run.json`; also while the run goes on.
"""

import argparse
import base64
import collections
import dataclasses
import html
import io
import json
import math
import pathlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from spatial_mamba_jax.errors import run_command, tell
from spatial_mamba_jax.fields import FLOAT32_MAX, INT32_MAX
from spatial_mamba_jax.paths import local_path
from spatial_mamba_jax.tasks.base import Column, Line, Panel
from spatial_mamba_jax.tasks.classification import panels as classification
from spatial_mamba_jax.training.digests import write_whole

if TYPE_CHECKING:
  import matplotlib.figure

# Of Okabe and Ito's colours, which also the colour-blind tell apart.
_TRAIN, _EMA, _RAW = "#0072B2", "#D55E00", "#009E73"


# Characters of a column's format; ".2%" has three.
_LONGEST_FORM = 4
# By kind of record.
_COLOURS = {"train": _TRAIN, "evaluation": _EMA, "evaluation_raw": _RAW}
# Dashes of a panel's lines of one kind, in their order.
_DASHES = ("-", "--", ":", "-.")
# Of every task; the loss first, unless the task draws it with its unit, the
# rest after what the task draws.
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
    "Waiting for data",
    "% of time",
    (Line("train", "data_wait", ""),),
    scale=100.0,
  ),
)


@dataclasses.dataclass(frozen=True)
class TaskReport:
  """What a report shows of a task; see `Task`."""

  score: str = classification.SCORE
  panels: Sequence[Panel] = classification.PANELS
  columns: Sequence[Column] = classification.COLUMNS


def _read_task(description: Any) -> TaskReport:
  """What `run.json` says; of classification where it is of version 1.

  Raises:
    ValueError: it says something else.
  """
  task = description.get("task")
  if task is None:
    return TaskReport()
  try:
    panels = [
      Panel(**{**x, "lines": [Line(*line) for line in x["lines"]]})
      for x in task["panels"]
    ]
    columns = [Column(*x) for x in task["columns"]]
    score = task["score"]
    lines = [line for panel in panels for line in panel.lines]
    texts = [x for panel in panels for x in (panel.title, panel.unit)]
    texts += [x for row in (*lines, *columns) for x in row]
    scales = [panel.scale for panel in panels]
    if not all(isinstance(x, str) for x in (score, *texts)) or None in map(
      _number, scales
    ):
      raise TypeError
    for column in columns:
      if len(column.form) > _LONGEST_FORM:
        raise ValueError("a column is too wide")
      format(0.0, column.form)
    return TaskReport(score, panels, columns)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError("its task makes no sense") from error


@dataclasses.dataclass(frozen=True)
class Run:
  """What a working directory tells of a run.

  Attributes:
    name: the directory's.
    records: the log's, by step.
    description: what `run.json` holds; empty where it cannot be read.
    task: what is shown of its task.
    notes: what is amiss, a sentence each.
  """

  name: str
  records: list[dict[str, Any]]
  description: dict[str, Any]
  task: TaskReport
  notes: list[str]

  def of_kind(self, kind: str) -> list[dict[str, Any]]:
    """The records of one kind."""
    return [record for record in self.records if record["kind"] == kind]

  def points(self, line: Line) -> tuple[list[int], list[float]]:
    """Steps and values of a line; NaN where it was not finite."""
    pairs = [
      (record["step"], _number(record.get(line.value)))
      for record in self.of_kind(line.kind)
    ]
    pairs = [(step, value) for step, value in pairs if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]

  @property
  def epoch_steps(self) -> float | None:
    """Steps an epoch, where `run.json` tells."""
    steps = _number(self.description.get("epoch_steps"))
    return steps if steps and steps >= 1 else None


def read_run(workdir: pathlib.Path) -> Run:
  """Reads the log of a run, and what describes it.

  Raises:
    ValueError: there is nothing to draw.
    OSError: a file cannot be read.
  """
  path = workdir / "metrics.jsonl"
  if not path.is_file():
    raise ValueError(f"{path} does not exist: give the --workdir of train.py")
  *lines, last = path.read_text(errors="replace").split("\n")
  records = [_parse(line) for line in lines]
  notes = []
  if broken := records.count(None):
    notes.append(f"{broken} lines of metrics.jsonl are damaged and left out.")
  if last:
    # Its writer was stopped, or writes it now.
    notes.append("The last line of metrics.jsonl is incomplete and left out.")
  whole = [record for record in records if record is not None]
  if not whole:
    raise ValueError(
      f"{path} holds no records yet: the first comes with the"
      " first logged window of steps"
    )
  try:
    description = dict(json.loads((workdir / "run.json").read_text()))
    task = _read_task(description)
  except (OSError, RecursionError, TypeError, ValueError):
    notes.append("run.json cannot be read: what the run was is not known.")
    description, task = {}, TaskReport()
  whole.sort(key=lambda record: record["step"])
  name = workdir.resolve().name.encode(errors="replace").decode()
  return Run(name, whole, description, task, notes)


def draw(run: Run) -> "matplotlib.figure.Figure":
  """The panels for which there are records, one above the other."""
  # Here, because it may be missing, which is then said in one line.
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  own = [line[:2] for panel in run.task.panels for line in panel.lines]
  loss = [] if ("train", "loss") in own else [_LOSS]
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


def _draw_panel(axes: Any, panel: Panel, run: Run) -> None:
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
      color=_COLOURS.get(line.kind, _TRAIN),
      label=line.name,
      linestyle=dash,
      linewidth=1.3,
      # Few points, or one, would be hard to see as a line.
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
    # A share of the height from 0 is left above a line that hardly changes.
    axes.update_datalim([(0, 0)], updatex=False)
    axes.autoscale_view(scalex=False)
    axes.set_ylim(bottom=0)
  if len(panel.lines) > 1:
    columns = 1 + (len(panel.lines) > 3)
    axes.legend(fontsize=8, frameon=False, handlelength=2.6, ncols=columns)


def page(run: Run, png: bytes) -> str:
  """The report as HTML without scripts, links or other files."""
  picture = base64.b64encode(png).decode()
  sections = [
    f"<h1>{_escape(run.name)}</h1>",
    *(f"<p class=note>{_escape(note)}</p>" for note in run.notes),
    f"<p>{_escape(_progress(run))}</p>",
    _evaluations(run),
    f'<img alt="Curves of the run, by step" '
    f'src="data:image/png;base64,{picture}">',
    "<h2>What the run was</h2>",
    _table(("", ""), _description_rows(run.description)),
  ]
  return _PAGE.format(title=_escape(run.name), body="\n".join(sections))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 46rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
img {{ width: 100%; height: auto; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0;
  border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }}
th {{ font-weight: 600; overflow-wrap: normal; }}
.note {{ border-left: 4px solid #D55E00; padding-left: .75rem; }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 10pt; }}
  img {{ max-height: 25cm; width: auto; max-width: 100%; }}
  tr, img {{ break-inside: avoid; }}
}}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _progress(run: Run) -> str:
  """How far the run has come."""
  step = run.records[-1]["step"]
  steps = _number(run.description.get("steps"))
  if not run.epoch_steps:
    return f"Step {step:,}."
  config = run.description.get("config")
  if steps is None and isinstance(config, dict):  # Of version 1.
    epochs = _number(config.get("epochs"))
    steps = None if epochs is None else epochs * run.epoch_steps
  line = f"Step {step:,}, epoch {step / run.epoch_steps:.2f}"
  if steps is None:
    return f"{line}."
  if step >= steps:
    return f"{line}: complete."
  return f"{line}, of {steps:,.0f} steps, {steps / run.epoch_steps:.6g} epochs."


def _evaluations(run: Run) -> str:
  """A table of the best and the last evaluation."""
  score = run.task.score
  evaluated = [
    record
    for record in run.of_kind("evaluation")
    if _number(record.get(score)) is not None
  ]
  if not evaluated:
    return "<p>Not evaluated yet.</p>"
  # As the best checkpoint is chosen: of equal ones the later.
  best = max(
    evaluated,
    key=lambda x: (
      -math.inf if math.isnan(x[score]) else x[score],
      x["step"],
    ),
  )
  last = evaluated[-1]
  if best["step"] == last["step"]:
    named = [("best and last", last)]
  else:
    named = [("best", best), ("last", last)]
  rows = []
  for name, ema in named:
    raw = [
      record
      for record in run.of_kind("evaluation_raw")
      if record["step"] == ema["step"]
    ]
    for weights, record in (
      ("moving average", ema),
      *(("raw", x) for x in raw),
    ):
      step = record["step"]
      rows.append(
        (
          name,
          weights,
          f"{step:,}",
          f"{step / run.epoch_steps:.1f}" if run.epoch_steps else "",
          *(_text(record.get(x.value), x.form) for x in run.task.columns),
        )
      )
  header = (
    *("evaluation", "weights", "step", "epoch"),
    *(column.name for column in run.task.columns),
  )
  return _table(header, rows)


def _description_rows(description: dict[str, Any]) -> list[tuple[str, str]]:
  rest = {k: x for k, x in description.items() if k != "task"}
  rows = []
  devices = rest.pop("devices", None)
  if isinstance(devices, list):
    kinds = collections.Counter(map(str, devices))
    text = ", ".join(f"{count} \u00d7 {kind}" for kind, count in kinds.items())
    rows.append(("devices", text))
  # The config, being the longest, comes last.
  config = rest.pop("config", {})
  return rows + _flatten(rest) + _flatten(config, "config")


def _flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
  if not isinstance(tree, dict):
    return [(prefix, tree if isinstance(tree, str) else json.dumps(tree))]
  rows = []
  for key, value in tree.items():
    rows += _flatten(value, f"{prefix}.{key}" if prefix else str(key))
  return rows


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  head = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
  body = "\n".join(
    f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>"
    for row in rows
  )
  return f"<div><table>\n<tr>{head}</tr>\n{body}\n</table></div>"


def _escape(text: str) -> str:
  return html.escape(text.encode(errors="replace").decode())


def _parse(line: str) -> dict[str, Any] | None:
  """A record, or None where the line holds none.

  A null is a value that was not finite.
  """
  try:
    record = json.loads(line)
  except (RecursionError, ValueError):
    return None
  if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
    return None
  step = record.get("step")
  if type(step) is not int or abs(step) > INT32_MAX:
    return None
  return {k: math.nan if _is_lost(x) else x for k, x in record.items()}


def _is_lost(value: Any) -> bool:
  """Whether a value was not finite, or is an integer that no float holds."""
  return value is None or (isinstance(value, int) and abs(value) > FLOAT32_MAX)


def _number(value: Any) -> float | None:
  """A logged number, infinities as NaN, which are not drawn."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  return float(value) if -FLOAT32_MAX <= value <= FLOAT32_MAX else math.nan


def _text(value: Any, form: str) -> str:
  number = _number(value)
  return "" if number is None else format(number, form)


def write_report(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Writes the picture and the page; returns their paths.

  Raises:
    ValueError: there is nothing to draw.
    OSError: a file cannot be read or written.
  """
  workdir = local_path(workdir, "the workdir")
  run = read_run(workdir)
  picture = io.BytesIO()
  with warnings.catch_warnings():
    # Of letters that the font lacks in a directory's name: boxes must do.
    warnings.filterwarnings("ignore", message="Glyph ")
    draw(run).savefig(picture, format="png")
  png = picture.getvalue()
  contents = {"report.png": png, "report.html": page(run, png).encode()}
  paths = [workdir / name for name in contents]
  for path, content in zip(paths, contents.values(), strict=True):
    write_whole(path, content)
  return paths


def main(arguments: list[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="report", description="Draws what a run has logged."
  )
  parser.add_argument(
    "workdir", type=pathlib.Path, help="the --workdir of train.py"
  )
  workdir = parser.parse_args(arguments).workdir
  return run_command(
    "report",
    lambda: tell("\n".join(map(str, write_report(workdir)))),
    (OSError, ValueError),
  )


if __name__ == "__main__":
  sys.exit(main())
